use crate::{decode::History, handler::IncomingEvent, ordering::Verdict, record::Record};

/// A partition's batch: records, and the attempts behind each. `events[i]` was decoded from `records[places[i]]`; the others
/// have their verdict already.
#[derive(Default)]
pub(crate) struct InHand {
    pub(crate) records: Vec<Record>,
    pub(crate) histories: Vec<History>,
    pub(crate) verdicts: Vec<Verdict>,
    pub(crate) events: Vec<IncomingEvent>,
    pub(crate) places: Vec<usize>,
}

impl InHand {
    /// Beside each event the record that it came in.
    pub(crate) fn records_of_events(&self) -> impl Iterator<Item = &Record> {
        self.places.iter().map(|place| &self.records[*place])
    }

    /// Beside each event the attempts behind it.
    pub(crate) fn histories_of_events(&self) -> impl Iterator<Item = &History> {
        self.places.iter().map(|place| &self.histories[*place])
    }

    /// Takes the verdicts of the events, in their order; one without keeps what it had.
    pub(crate) fn judge(&mut self, verdicts: impl IntoIterator<Item = Option<Verdict>>) {
        for (place, verdict) in self.places.iter().zip(verdicts) {
            if let Some(verdict) = verdict {
                self.verdicts[*place] = verdict;
            }
        }
    }
}
