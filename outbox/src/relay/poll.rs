use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Mode, Relay, error::SessionError};
use crate::{
    delivery::Records,
    poll::{Poll, PollSettings},
    table,
};

/// How long whoever commits has to publish before the table is asked: longer than a commit and a broker's answer take.
const AFTER_COMMIT_GRACE: Duration = Duration::from_secs(2);

impl Relay {
    /// One life of a relay that reads the table. `drained` hears when the backlog is published.
    pub(super) async fn poll_table(&self, drained: &Notify, stop: &CancellationToken) -> Result<(), SessionError> {
        let publisher = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            publisher = self.publisher() => publisher?,
        };
        let records = Records {
            marks: true,
            slot: None,
            rereads: true,
            silent_after: self.settings.silent_after,
        };
        let mut delivery = self.delivery(publisher, records).await?;
        let ended = async {
            let settings = PollSettings {
                longest_pause: self.settings.poll_interval,
                grace: self.grace(),
                since: table::unmarked_before(&self.table, &self.pool, &self.settings.slot).await?,
                wake: self.wake.clone(),
            };
            let poll = Poll {
                table: &self.table,
                pool: &self.pool,
                member: self.member,
                status: &self.status,
                settings: &settings,
                drained,
            };
            let mut upkeep = self.upkeep(None);
            Ok(poll.run(&mut delivery, &mut upkeep, stop).await?)
        }
        .await;
        self.end(delivery).await;
        ended
    }

    /// Younger rows are somebody else's to publish.
    fn grace(&self) -> Duration {
        match self.settings.mode {
            Mode::Wal | Mode::Poll | Mode::Auto => Duration::ZERO,
            Mode::AfterCommit => AFTER_COMMIT_GRACE,
            Mode::External => self.settings.sweep_after,
        }
    }
}
