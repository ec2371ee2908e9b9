use crate::loadtest;

#[test]
fn every_event_of_a_load_is_measured_once_whichever_way_it_was_appended() -> anyhow::Result<()> {
    for through in ["table", "api"] {
        let dir = tempfile::tempdir()?;
        let load = [
            "--rate",
            "50",
            "--duration",
            "3s",
            "--warm-up",
            "1s",
            "--through",
            through,
        ];
        let args = [
            ["latency", "--relay", "wal:published", "--rehearsal", "0s"].as_slice(),
            &load,
        ]
        .concat();
        let (run, result) = loadtest(&args, &dir.path().join("latency.json"))?;
        let stderr = String::from_utf8_lossy(&run.stderr);
        // On a machine that is busy with other tests the rate may not be reached, and 99 says so.
        assert!(matches!(run.status.code(), Some(0 | 99)), "{stderr}");
        let measured = &result["results"][0];
        assert_eq!(measured["through"], through, "{measured}");
        assert_eq!(measured["committed"], 200, "{measured}");
        assert_eq!(
            (&measured["missing"], &measured["failed"]),
            (&0.into(), &0.into()),
            "{measured}"
        );
        for clock in [
            "append_to_broker",
            "append_to_receiver",
            "due_to_broker",
            "append",
            "late_start",
        ] {
            assert_eq!(measured[clock]["count"], 150, "{clock}: {measured}");
        }
    }
    Ok(())
}
