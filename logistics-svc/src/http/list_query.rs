//! The query of the list.

use service_runtime::{
    problem::Problem,
    query::{limit, pairs, wrong},
};

use super::cursor;
use crate::{shipment::Status, tables::shipments::Filter};

const DEFAULT_LIMIT: u16 = 50;
const MAX_LIMIT: u16 = 200;

#[derive(Debug)]
pub(super) struct ListQuery {
    pub(super) filter: Filter,
    pub(super) before: Option<i64>,
    pub(super) limit: u16,
}

/// # Errors
/// A problem that names the parameter.
pub(super) fn parse(query: &str) -> Result<ListQuery, Problem> {
    let mut parsed = ListQuery {
        filter: Filter::default(),
        before: None,
        limit: DEFAULT_LIMIT,
    };
    for (name, value) in pairs(query)? {
        match name.as_str() {
            "status" => parsed.filter.status = Some(status(&value)?),
            "order_id" => parsed.filter.order_id = Some(order_id(value)?),
            "cursor" => parsed.before = Some(cursor::decode(&value).ok_or_else(|| wrong("cursor", NOT_A_CURSOR))?),
            "limit" => parsed.limit = limit("limit", &value, MAX_LIMIT)?,
            _ => return Err(wrong(&name, "is unknown, known are status, order_id, cursor and limit")),
        }
    }
    Ok(parsed)
}

const NOT_A_CURSOR: &str = "is not one that this service gave out; start again without it";

/// The same list from `cursor` on, as the value of a `Link` header.
pub(super) fn next_link(query: &str, cursor: &str) -> String {
    let kept = query
        .split('&')
        .filter(|pair| !pair.is_empty() && !pair.starts_with("cursor="));
    let pairs: String = kept.map(|pair| format!("{pair}&")).collect();
    format!("</v1/shipments?{pairs}cursor={cursor}>; rel=\"next\"")
}

fn status(value: &str) -> Result<Status, Problem> {
    Status::from_name(value).ok_or_else(|| {
        let known: Vec<&str> = Status::ALL.into_iter().map(Status::as_str).collect();
        wrong("status", &format!("is not one of {}", known.join(", ")))
    })
}

fn order_id(value: String) -> Result<String, Problem> {
    shared_events::shipment::check_name("order_id", &value).map_err(|error| wrong("order_id", &error.reason))?;
    Ok(value)
}
