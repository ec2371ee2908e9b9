use std::collections::{BTreeMap, BTreeSet, HashMap};

use inbox::{Handler, HandlerError, IncomingEvent, Key, Outcome, Row, UnknownTypes};
use shared_events::envelope::InvalidField;
use shared_events::{
    Envelope, Payload, Rejection,
    shipment::{
        AGGREGATE_TYPE, ShipmentCancelled, ShipmentCompleted, ShipmentCreated, ShipmentEvent, ShipmentHeld,
        ShipmentReleased, ShipmentReturned,
    },
};
use sqlx::PgTransaction;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    order::{Order, OrderLine, OrderStatus},
    shipment::{Effect, Entry, Shipment, decide, pass_over},
    tables::{
        order_lines, order_timeline, orders,
        products::{self, StockChanges},
        shipments,
    },
};

/// The events that have an effect here.
pub const KNOWN_TYPES: [&str; 6] = [
    ShipmentCreated::TYPE,
    ShipmentCompleted::TYPE,
    ShipmentHeld::TYPE,
    ShipmentReleased::TYPE,
    ShipmentCancelled::TYPE,
    ShipmentReturned::TYPE,
];

/// What the engine calls.
#[derive(Debug, Clone, Copy)]
pub struct ApplyShipment {
    pub unknown_types: UnknownTypes,
}

impl Handler for ApplyShipment {
    /// Everything about a shipment: an event that is skipped unseen would leave a hole in the shipment's sequence, and
    /// the events behind it could never take effect. If unknown types are dead letters, that is what they are to do.
    fn takes(&self, envelope: &Envelope) -> bool {
        KNOWN_TYPES.contains(&envelope.event_type.as_str())
            || (self.unknown_types == UnknownTypes::Skip && envelope.aggregate_type == AGGREGATE_TYPE)
    }

    async fn apply(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
    ) -> Result<Vec<Outcome>, HandlerError> {
        let envelopes: Vec<&Envelope> = events.iter().map(|event| &event.envelope).collect();
        Ok(apply(transaction, &envelopes).await?)
    }

    /// Without its first event a shipment is unknown for ever.
    fn can_pass_over(event_type: &str) -> bool {
        event_type != ShipmentCreated::TYPE
    }

    /// The shipment's sequence moves past it. One that is not the shipment's next changes nothing: what comes behind it stays
    /// early until someone decides.
    async fn pass_over(&self, transaction: &mut PgTransaction<'_>, event: &IncomingEvent) -> Result<(), HandlerError> {
        let known = shipments::lock(transaction, &[event.envelope.aggregate_id.as_str()]).await?;
        if let Ok(Some(moved)) = pass_over(known.first(), &event.envelope) {
            shipments::save(transaction, &[&moved]).await?;
        }
        Ok(())
    }

    /// The shipment counts as having taken all events before this one. One that is not known yet has nothing that could go on.
    async fn pass_to(
        &self,
        transaction: &mut PgTransaction<'_>,
        (aggregate_type, id): &Key,
        sequence: i64,
    ) -> Result<bool, HandlerError> {
        let known = shipments::lock(transaction, &[id.as_str()]).await?;
        let Some(shipment) = known.first().filter(|_| aggregate_type == AGGREGATE_TYPE) else {
            return Ok(false);
        };
        let moved = Shipment {
            sequence: sequence - 1,
            ..shipment.clone()
        };
        // One that is further already stays where it is.
        shipments::save(transaction, &[&moved]).await?;
        Ok(true)
    }

    async fn rows(&self, transaction: &mut PgTransaction<'_>, event: &IncomingEvent) -> Result<Vec<Row>, HandlerError> {
        Ok(rows(transaction, &event.envelope).await?)
    }
}

/// Every row that an event may change or bring about: its order with lines and timeline, its shipment, the products of its
/// lines. Locked in the order in which [`apply`] locks them.
async fn rows(transaction: &mut PgTransaction<'_>, envelope: &Envelope) -> Result<Vec<Row>, sqlx::Error> {
    let event = match read(envelope) {
        Ok(event) => Some(event),
        Err(Rejection::UnknownType(_)) => None,
        Err(_) => return Ok(Vec::new()),
    };
    let mut rows = Vec::new();
    if let Some(event) = &event {
        rows.extend(orders::rows(transaction, event.order_id()).await?);
        rows.extend(order_lines::rows(transaction, event.order_id()).await?);
        rows.extend(order_timeline::rows(transaction, event.order_id()).await?);
    }
    rows.extend(shipments::rows(transaction, &envelope.aggregate_id).await?);
    if let Some(event) = &event {
        let skus: Vec<&str> = event.lines().iter().map(|line| line.sku.as_str()).collect();
        rows.extend(products::rows(transaction, &skus).await?);
    }
    Ok(rows)
}

/// Applies shipment events, in this order, inside the caller's transaction, and says for each what became of it. An
/// event without effect has changed nothing; the others are not touched by its failure. An event of a type that is not
/// known only moves its shipment's sequence.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn apply(transaction: &mut PgTransaction<'_>, envelopes: &[&Envelope]) -> Result<Vec<Outcome>, sqlx::Error> {
    let events: Vec<Result<ShipmentEvent, Rejection>> = envelopes.iter().map(|envelope| read(envelope)).collect();
    let mut books = Books::open(transaction, envelopes, &events).await?;
    let outcomes = envelopes
        .iter()
        .zip(&events)
        .map(|(envelope, event)| match event {
            Ok(event) => books.post(envelope, event),
            Err(Rejection::UnknownType(_)) => books.skip(envelope),
            Err(rejection) => Outcome::DeadLetter(rejection.clone().into()),
        })
        .collect();
    books.save(transaction).await?;
    Ok(outcomes)
}

fn read(envelope: &Envelope) -> Result<ShipmentEvent, Rejection> {
    if envelope.aggregate_type != AGGREGATE_TYPE {
        let reason = format!("{:?} is not {AGGREGATE_TYPE:?}", envelope.aggregate_type);
        return Err(Rejection::InvalidEnvelope(InvalidField::new("aggregateType", reason)));
    }
    ShipmentEvent::from_envelope(envelope)
}

/// The rows that a batch of events meets, locked, and what the batch has changed in them so far. Deciding in memory
/// before anything is written keeps one bad event from failing the rest, and makes the number of statements
/// independent of the number of events.
struct Books {
    /// With the status that the row has.
    orders: HashMap<String, (Order, String)>,
    shipments: HashMap<String, Shipment>,
    changed_shipments: BTreeSet<String>,
    changed_lines: BTreeMap<(String, String), OrderLine>,
    changed_orders: BTreeSet<String>,
    stock: BTreeMap<String, StockChanges>,
    entries: Vec<TimelineEntry>,
}

struct TimelineEntry {
    shipment: Shipment,
    kind: Entry,
    event_id: Uuid,
    happened_at: OffsetDateTime,
    units: i64,
}

impl Books {
    async fn open(
        transaction: &mut PgTransaction<'_>,
        envelopes: &[&Envelope],
        events: &[Result<ShipmentEvent, Rejection>],
    ) -> Result<Self, sqlx::Error> {
        let mut order_ids = BTreeSet::new();
        let mut shipment_ids = BTreeSet::new();
        for (envelope, event) in envelopes.iter().zip(events) {
            match event {
                Ok(event) => {
                    order_ids.insert(event.order_id());
                    shipment_ids.insert(envelope.aggregate_id.as_str());
                }
                Err(Rejection::UnknownType(_)) => {
                    shipment_ids.insert(envelope.aggregate_id.as_str());
                }
                Err(_) => {}
            }
        }
        let order_ids: Vec<&str> = order_ids.into_iter().collect();
        let shipment_ids: Vec<&str> = shipment_ids.into_iter().collect();
        let mut books = Self {
            orders: HashMap::new(),
            shipments: HashMap::new(),
            changed_shipments: BTreeSet::new(),
            changed_lines: BTreeMap::new(),
            changed_orders: BTreeSet::new(),
            stock: BTreeMap::new(),
            entries: Vec::new(),
        };
        if shipment_ids.is_empty() {
            return Ok(books);
        }
        let locked = orders::lock(transaction, &order_ids).await?;
        let mut lines = order_lines::read(transaction, &order_ids).await?;
        for (id, status) in locked {
            let order = lines.remove(&id).unwrap_or_default();
            books.orders.insert(id, (order, status));
        }
        let known = shipments::lock(transaction, &shipment_ids).await?;
        books.shipments = known
            .into_iter()
            .map(|shipment| (shipment.id.clone(), shipment))
            .collect();
        Ok(books)
    }

    /// Decides one event on top of those before it.
    fn post(&mut self, envelope: &Envelope, event: &ShipmentEvent) -> Outcome {
        let shipment = self.shipments.get(&envelope.aggregate_id);
        let order = self.orders.get(event.order_id()).map(|(order, _)| order);
        match decide(shipment, order, envelope, event) {
            Err(refusal) => refusal.outcome(),
            Ok(effect) => {
                self.absorb(envelope, event, effect);
                Outcome::Applied
            }
        }
    }

    /// An event that means nothing here, but has its place in the shipment's sequence.
    fn skip(&mut self, envelope: &Envelope) -> Outcome {
        match pass_over(self.shipments.get(&envelope.aggregate_id), envelope) {
            Err(refusal) => refusal.outcome(),
            Ok(moved) => {
                if let Some(shipment) = moved {
                    self.changed_shipments.insert(shipment.id.clone());
                    self.shipments.insert(shipment.id.clone(), shipment);
                }
                Outcome::Skipped
            }
        }
    }

    fn absorb(&mut self, envelope: &Envelope, event: &ShipmentEvent, effect: Effect) {
        let Effect {
            shipment,
            order,
            stock,
            entry,
        } = effect;
        let order_id = shipment.order_id.clone();
        if let Some(after) = order {
            for (sku, _) in &stock {
                if let Some(line) = after.lines.get(sku) {
                    self.changed_lines.insert((order_id.clone(), sku.clone()), *line);
                }
            }
            if let Some((order, _)) = self.orders.get_mut(&order_id) {
                *order = after;
            }
            self.changed_orders.insert(order_id);
        }
        for (sku, change) in stock {
            self.stock.entry(sku).or_default().add(change);
        }
        if let Some(kind) = entry {
            self.entries.push(TimelineEntry {
                shipment: shipment.clone(),
                kind,
                event_id: envelope.id,
                happened_at: envelope.timestamp,
                units: event.lines().iter().map(|line| i64::from(line.quantity)).sum(),
            });
        }
        self.changed_shipments.insert(shipment.id.clone());
        self.shipments.insert(shipment.id.clone(), shipment);
    }

    /// At most one statement per table; products last, because every batch wants their rows.
    async fn save(&self, transaction: &mut PgTransaction<'_>) -> Result<(), sqlx::Error> {
        let shipments: Vec<&Shipment> = self
            .changed_shipments
            .iter()
            .filter_map(|id| self.shipments.get(id))
            .collect();
        if shipments.is_empty() {
            return Ok(());
        }
        if !self.changed_lines.is_empty() {
            let lines: Vec<(&str, &str, OrderLine)> = self
                .changed_lines
                .iter()
                .map(|((order_id, sku), line)| (order_id.as_str(), sku.as_str(), *line))
                .collect();
            order_lines::save(transaction, &lines).await?;
        }
        let statuses = self.changed_statuses();
        if !statuses.is_empty() {
            orders::save(transaction, &statuses).await?;
        }
        shipments::save(transaction, &shipments).await?;
        if !self.entries.is_empty() {
            order_timeline::append(transaction, &self.new_entries()).await?;
        }
        if !self.stock.is_empty() {
            products::add(transaction, &self.stock).await?;
        }
        Ok(())
    }

    fn changed_statuses(&self) -> Vec<(&str, OrderStatus)> {
        let of_order = |id: &String| {
            let (id, (order, written)) = self.orders.get_key_value(id)?;
            let status = order.status();
            (status.as_str() != written).then_some((id.as_str(), status))
        };
        self.changed_orders.iter().filter_map(of_order).collect()
    }

    fn new_entries(&self) -> Vec<order_timeline::NewEntry<'_>> {
        self.entries
            .iter()
            .map(|entry| order_timeline::NewEntry {
                order_id: &entry.shipment.order_id,
                event_id: entry.event_id,
                shipment_id: &entry.shipment.id,
                kind: entry.kind,
                happened_at: entry.happened_at,
                units: entry.units,
                carrier: &entry.shipment.carrier,
                tracking_number: entry.shipment.tracking_number.as_deref(),
                reason: entry.shipment.reason.as_deref(),
            })
            .collect()
    }
}
