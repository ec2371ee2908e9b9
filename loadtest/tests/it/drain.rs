use serde_json::Value;

use crate::loadtest;

const ROWS: u64 = 2_000;

fn drain(relay: &str) -> anyhow::Result<Vec<Value>> {
    let dir = tempfile::tempdir()?;
    let rows = ROWS.to_string();
    let args = ["drain", "--rows", &rows, "--events-per-key", "7", "--relay", relay];
    let (run, result) = loadtest(&args, &dir.path().join("drain.json"))?;
    assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stderr));
    let table = String::from_utf8(run.stdout)?;
    let results = result["results"].as_array().cloned().unwrap_or_default();
    for relay in relay.split(',') {
        assert!(table.contains(&format!("relay {relay}")), "{table}");
    }
    Ok(results)
}

fn assert_accounted(result: &Value) {
    let account = &result["account"];
    assert_eq!(account["rows"], ROWS, "{result}");
    assert_eq!(account["distinct"], ROWS, "{result}");
    assert_eq!(account["missing"], 0, "{result}");
    assert_eq!(account["inversions"], 0, "{result}");
    let (records, duplicates) = (account["records"].as_u64(), account["duplicates"].as_u64());
    assert_eq!(records, duplicates.map(|duplicates| ROWS + duplicates), "{result}");
    assert_eq!(result["failures"], serde_json::json!([]), "{result}");
}

#[test]
fn every_row_of_a_backlog_is_accounted_for_and_marked() -> anyhow::Result<()> {
    let results = drain("wal:published,poll:published")?;
    assert_eq!(results.len(), 2);
    for result in &results {
        assert_accounted(result);
        assert!(result["seconds_to_marks"].is_number(), "{result}");
        assert!(result["usage"][0]["peak_kib"].as_u64() > Some(1_000), "{result}");
    }
    Ok(())
}

#[test]
fn a_relay_without_lifecycle_is_not_waited_for() -> anyhow::Result<()> {
    let results = drain("wal:off")?;
    assert_accounted(&results[0]);
    assert!(results[0]["seconds_to_marks"].is_null(), "{}", results[0]);
    Ok(())
}
