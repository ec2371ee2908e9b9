use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value};
use shared_events::envelope::format_timestamp;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::screen::text;

/// Set argument by argument: as the next heading, it would also stand above what follows the filter.
const WHICH: &str = "Which dead letters";

#[derive(Debug, Clone, Default, Args)]
pub(super) struct Filter {
    /// Error type and message without what differs from letter to letter; `groups` lists them.
    #[arg(long, help_heading = WHICH)]
    fingerprint: Option<String>,
    /// Such as `ships_too_many`.
    #[arg(long, help_heading = WHICH)]
    error_type: Option<String>,
    /// The event's type, such as `ShipmentCompleted`.
    #[arg(long = "type", help_heading = WHICH, value_name = "EVENT_TYPE")]
    event_type: Option<String>,
    /// The shipment's id.
    #[arg(long, help_heading = WHICH)]
    aggregate_id: Option<String>,
    /// Died last at or after: RFC 3339, or how long ago, such as `2h`.
    #[arg(long, help_heading = WHICH, value_name = "TIME", value_parser = moment)]
    from: Option<String>,
    /// Died last before, as for --from.
    #[arg(long, help_heading = WHICH, value_name = "TIME", value_parser = moment)]
    to: Option<String>,
}

/// What reading may ask for beside it.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct ReadFilter {
    /// `open`, `redriving`, `resolved` or `archived`; without it, all but the archived ones.
    #[arg(long, help_heading = WHICH)]
    state: Option<String>,
    /// Of the consumer that gave it up last.
    #[arg(long, help_heading = WHICH)]
    consumer_version: Option<String>,
    #[command(flatten)]
    filter: Filter,
}

impl Filter {
    /// The given fields, by their names in the API.
    pub(super) fn fields(&self) -> Vec<(&'static str, String)> {
        let fields = [
            ("fingerprint", &self.fingerprint),
            ("error_type", &self.error_type),
            ("type", &self.event_type),
            ("aggregate_id", &self.aggregate_id),
            ("from", &self.from),
            ("to", &self.to),
        ];
        given(&fields)
    }

    /// For a person; empty without a field.
    pub(super) fn described(&self) -> String {
        let fields = self.fields().into_iter();
        let fields: Vec<String> = fields
            .map(|(name, value)| format!("{name} = {}", text(&value.into())))
            .collect();
        fields.join(", ")
    }

    pub(super) fn body(&self) -> Map<String, Value> {
        let fields = self.fields().into_iter();
        fields.map(|(name, value)| (name.to_owned(), value.into())).collect()
    }
}

impl ReadFilter {
    pub(super) fn query(&self) -> Vec<(&'static str, String)> {
        let own = [("state", &self.state), ("consumer_version", &self.consumer_version)];
        [given(&own), self.filter.fields()].concat()
    }
}

fn given(fields: &[(&'static str, &Option<String>)]) -> Vec<(&'static str, String)> {
    let fields = fields.iter().copied();
    fields
        .filter_map(|(name, value)| value.clone().map(|value| (name, value)))
        .collect()
}

/// A time, or one so long ago.
fn moment(text: &str) -> Result<String, String> {
    if OffsetDateTime::parse(text, &Rfc3339).is_ok() {
        return Ok(text.to_owned());
    }
    let ago: Duration = humantime::parse_duration(text.trim_end_matches("ago").trim_end())
        .map_err(|_| "expected a time such as 2026-11-22T05:00:00Z, or how long ago, such as 15m".to_owned())?;
    OffsetDateTime::now_utc()
        .checked_sub(ago.try_into().map_err(|_| "is too long ago".to_owned())?)
        .and_then(|at| format_timestamp(at).ok())
        .ok_or_else(|| "is too long ago".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_rfc_3339_or_so_long_ago() {
        assert_eq!(
            moment("2026-11-22T05:00:00+01:00").as_deref(),
            Ok("2026-11-22T05:00:00+01:00")
        );
        for ago in ["15m", "15 min ago"] {
            let at = OffsetDateTime::parse(&moment(ago).unwrap(), &Rfc3339).unwrap();
            let off = (OffsetDateTime::now_utc() - at).whole_seconds() - 15 * 60;
            assert!(off.abs() < 60, "{ago}: {at}");
        }
        for wrong in ["", "yesterday", "2026-11-22", "999999999y"] {
            assert!(moment(wrong).is_err(), "{wrong:?}");
        }
    }
}
