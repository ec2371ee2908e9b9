use std::fmt::Write;

use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::cli::{
    Desk,
    failure::{Ended, Failure},
    screen::text,
};

pub(super) async fn run(desk: &Desk, id: Uuid) -> Result<Ended, Failure> {
    let path = ["admin", "dead-letters", &id.to_string(), "dry-run"];
    let tried = desk.client.post(&path, &json!({}), false).await?;
    desk.screen.result(&tried, differences)?;
    Ok(match tried["outcome"].as_str() {
        Some("applied" | "duplicate" | "skipped") => Ended::Done,
        _ => Ended::Unmet,
    })
}

/// A row that would be new by its columns, one that would change by those that do.
fn differences(tried: &Value) -> String {
    let mut shown = match tried["outcome"].as_str() {
        Some("applied") => "it would take effect".to_owned(),
        Some("duplicate") => "it has taken effect already".to_owned(),
        Some("skipped") => "it would be skipped".to_owned(),
        Some("retry") => "it would wait in a retry topic".to_owned(),
        Some("early") => "it would wait for an earlier event".to_owned(),
        Some("dead_letter") => "it would die again".to_owned(),
        _ => format!("its outcome would be {}", text(&tried["outcome"])),
    };
    if let Some(message) = tried["error_message"].as_str() {
        write!(shown, ": {}: {}", text(&tried["error_type"]), text(&message.into())).ok();
    }
    shown.push_str("; nothing was written\n");
    for change in tried["changes"].as_array().into_iter().flatten() {
        let (before, after) = (change["before"].as_object(), change["after"].as_object());
        let mark = match (before, after) {
            (None, _) => '+',
            (_, None) => '-',
            _ => '~',
        };
        let key: Vec<String> = pairs(change["key"].as_object());
        writeln!(shown, "{mark} {} {}", text(&change["table"]), key.join(", ")).ok();
        let columns: Vec<&String> = match (before, after) {
            (Some(before), _) => before.keys().collect(),
            (None, Some(after)) => after.keys().collect(),
            (None, None) => Vec::new(),
        };
        for column in columns {
            let side = |row: Option<&Map<String, Value>>| row.and_then(|row| row.get(column)).map(text);
            let line = match (side(before), side(after)) {
                (Some(before), Some(after)) => format!("{before} -> {after}"),
                (one, other) => one.or(other).unwrap_or_default(),
            };
            writeln!(shown, "    {column}: {line}").ok();
        }
    }
    shown
}

fn pairs(row: Option<&Map<String, Value>>) -> Vec<String> {
    let row = row.into_iter().flatten();
    row.map(|(name, value)| format!("{name} = {}", text(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_new_and_removed_rows_are_told_apart() {
        let tried = json!({"outcome": "applied", "changes": [
            {"table": "order_lines", "key": {"order_id": "10248", "sku": "11"},
             "before": {"shipped_quantity": 0}, "after": {"shipped_quantity": 12}},
            {"table": "shipments", "key": {"id": "1"}, "before": null, "after": {"status": "open"}},
            {"table": "orders", "key": {"id": "7"}, "before": {"status": "paid"}, "after": null},
        ]});
        assert_eq!(
            differences(&tried),
            "it would take effect; nothing was written\n\
             ~ order_lines order_id = 10248, sku = 11\n    shipped_quantity: 0 -> 12\n\
             + shipments id = 1\n    status: open\n\
             - orders id = 7\n    status: paid\n"
        );
    }
}
