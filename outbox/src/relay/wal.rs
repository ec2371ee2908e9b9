use tokio_util::sync::CancellationToken;

use super::{Relay, error::SessionError};
use crate::{
    delivery::{Delivery, Records},
    publisher::Publisher,
    status::{RelayState, Source},
    sweep::sweep_settled,
    table::{self, Position, Unsent},
    wal::{self, Connection, Origin},
};

/// The lead of a slot, and a producer: everything before the first event.
pub(super) struct Prepared {
    connection: Connection,
    origin: Origin,
    publisher: Publisher,
}

impl Relay {
    /// One life of the relay: lead → acquire the slot → sweep if it is not where we left it → stream.
    pub(super) async fn follow_wal(&self, stop: &CancellationToken) -> Result<(), SessionError> {
        let prepared = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            prepared = self.prepare(|| self.status.set(RelayState::Standby)) => prepared?,
        };
        self.deliver(prepared, std::future::pending(), stop).await
    }

    /// Nothing is lost by dropping it half-way.
    pub(super) async fn prepare(&self, on_standby: impl Fn()) -> Result<Prepared, SessionError> {
        let mut connection = Connection::connect(&self.address, "outbox-relay").await?;
        self.slot.lead(&mut connection, on_standby).await?;
        let origin = self.slot.acquire(&mut connection).await?;
        let publisher = self.publisher().await?;
        Ok(Prepared {
            connection,
            origin,
            publisher,
        })
    }

    /// Streams until told to stop, or until `breached` says why the slot costs too much.
    pub(super) async fn deliver(
        &self,
        prepared: Prepared,
        breached: impl Future<Output = String>,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        let Prepared {
            connection,
            origin,
            publisher,
        } = prepared;
        let records = Records {
            marks: self.marks(),
            slot: Some(origin.identity.clone()),
            rereads: false,
            silent_after: self.settings.silent_after,
        };
        let mut delivery = self.delivery(publisher, records).await?;
        let ended = tokio::select! {
            ended = self.sweep_and_stream(connection, &origin, &mut delivery, stop) => ended,
            reason = breached => Err(SessionError::Budget(reason)),
        };
        self.end(delivery).await;
        ended
    }

    async fn sweep_and_stream(
        &self,
        mut connection: Connection,
        origin: &Origin,
        delivery: &mut Delivery,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        let (table, pool) = (&self.table, &self.pool);
        let recorded = table::recorded_position(table, pool, &origin.identity).await?;
        let unsent = Unsent {
            since: table::unmarked_before(table, pool, &origin.identity.slot).await?,
            ..Unsent::default()
        };
        if origin.confirmed > recorded {
            self.status.set(RelayState::Sweeping);
            tracing::warn!(
                slot = self.slot.name,
                found = ?origin.found,
                confirmed = %origin.confirmed,
                recorded = %recorded,
                "the slot is not where this relay left it; publishing every unsent row from the table first"
            );
            let swept = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                swept = sweep_settled(table, pool, delivery, &unsent) => swept?,
            };
            let position = Position {
                lsn: origin.confirmed,
                unmarked_before: None,
            };
            table::record_position(table, pool, &origin.identity, position).await?;
            tracing::info!(slot = self.slot.name, swept, "sweep finished");
        }
        self.slot.start(&mut connection).await?;
        self.status.switch(Source::Wal, "the slot streams");
        self.status.set(RelayState::Streaming);
        let sweep_after = self.marks().then_some(self.settings.sweep_after);
        let mut upkeep = self.upkeep(sweep_after);
        let on_stall = |stalled| self.status.streaming(stalled);
        Ok(wal::stream(
            connection,
            delivery,
            origin.confirmed,
            &mut upkeep,
            &unsent,
            on_stall,
            stop,
        )
        .await?)
    }
}
