//! The domain, pure: a shipment's states, and for each command an event or a typed refusal. No SQL, no clock.
//!
//! ```text
//!            complete               return (all that is left)
//!   open ───────────────► completed ───────────────────────► returned
//!   │ ▲  hold                 │ ▲
//!   │ └──────── on_hold       └─┘ return (a part)
//!   │   release    │
//!   └──────────────┴─ cancel ─► cancelled
//! ```

use std::fmt;

use shared_events::{
    envelope::InvalidField,
    shipment::{
        Line, ShipmentCancelled, ShipmentCompleted, ShipmentCreated, ShipmentEvent, ShipmentHeld, ShipmentReleased,
        ShipmentReturned, check_lines, check_name, check_reason,
    },
};
use time::OffsetDateTime;

/// Where a shipment stands. Every status is set by a command and may be persisted; `cancelled` and `returned` are final.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Open,
    OnHold,
    Completed,
    Cancelled,
    Returned,
}

impl Status {
    pub const ALL: [Self; 5] = [
        Self::Open,
        Self::OnHold,
        Self::Completed,
        Self::Cancelled,
        Self::Returned,
    ];

    /// The name in the REST interface and in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::OnHold => "on_hold",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Returned => "returned",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == name)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// A line of a shipment, in pieces: 1 ≤ quantity, 0 ≤ returned ≤ quantity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShipmentLine {
    pub sku: String,
    pub quantity: i32,
    pub returned_quantity: i32,
}

impl ShipmentLine {
    fn left(&self) -> i32 {
        self.quantity - self.returned_quantity
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shipment {
    pub id: i64,
    pub order_id: String,
    pub warehouse: String,
    pub carrier: String,
    /// Known once completed.
    pub tracking_number: Option<String>,
    pub status: Status,
    /// The last event's sequence, at least 1.
    pub sequence: i64,
    /// Of the hold in force, of the cancellation, or of the latest return.
    pub reason: Option<String>,
    /// In the order of their skus, byte by byte.
    pub lines: Vec<ShipmentLine>,
    pub created_at: OffsetDateTime,
    /// The last event's time.
    pub updated_at: OffsetDateTime,
    pub completed_at: Option<OffsetDateTime>,
}

/// What the warehouse takes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewShipment {
    pub order_id: String,
    pub warehouse: String,
    pub carrier: String,
    pub lines: Vec<Line>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Without a tracking number of the carrier's, the warehouse's own label number is used.
    Complete {
        tracking_number: Option<String>,
    },
    Hold {
        reason: String,
    },
    Release,
    Cancel {
        reason: String,
    },
    /// Without lines: everything that has not come back yet.
    Return {
        reason: String,
        lines: Option<Vec<Line>>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Changed(Box<Changed>),
    /// It had been completed before: nothing to do, nothing to announce.
    AlreadyCompleted,
}

/// The shipment as it is now, and the one event that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    pub shipment: Shipment,
    pub event: ShipmentEvent,
}

/// Why a command cannot be carried out. Nothing is changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("cannot {command} a shipment that is {status}, it must be {needed}")]
    WrongStatus {
        command: &'static str,
        status: Status,
        needed: &'static str,
    },
    #[error("the shipment was completed with tracking number {recorded:?}")]
    OtherTrackingNumber { recorded: String },
    #[error("{sku:?} is not in the shipment")]
    UnknownSku { line: usize, sku: String },
    #[error("{asked} of {sku:?} cannot come back, {left} are out")]
    ReturnsTooMany {
        line: usize,
        sku: String,
        asked: i32,
        left: i32,
    },
}

impl NewShipment {
    /// # Errors
    /// Names the first field that cannot be meant, e.g. `lines[2].quantity`.
    pub fn check(&self) -> Result<(), InvalidField> {
        check_name("order_id", &self.order_id)?;
        check_name("warehouse", &self.warehouse)?;
        check_name("carrier", &self.carrier)?;
        check_lines(&self.lines)
    }
}

impl Command {
    /// # Errors
    /// Names the first field that cannot be meant.
    pub fn check(&self) -> Result<(), InvalidField> {
        match self {
            Self::Complete { tracking_number: None } | Self::Release => Ok(()),
            Self::Complete {
                tracking_number: Some(number),
            } => check_name("tracking_number", number),
            Self::Hold { reason } | Self::Cancel { reason } | Self::Return { reason, lines: None } => {
                check_given_reason(reason)
            }
            Self::Return {
                reason,
                lines: Some(lines),
            } => check_given_reason(reason).and_then(|()| check_lines(lines)),
        }
    }
}

fn check_given_reason(reason: &str) -> Result<(), InvalidField> {
    if reason.trim().is_empty() {
        return Err(InvalidField::new("reason", "is empty"));
    }
    check_reason(reason)
}

impl Shipment {
    /// Takes on a shipment; sequence 1.
    pub fn create(id: i64, new: NewShipment, now: OffsetDateTime) -> Changed {
        let mut lines = new.lines;
        lines.sort_by(|a, b| a.sku.cmp(&b.sku));
        let event = ShipmentEvent::Created(ShipmentCreated {
            order_id: new.order_id.clone(),
            warehouse: new.warehouse.clone(),
            carrier: new.carrier.clone(),
            lines: lines.clone(),
            created_at: now,
        });
        let not_returned = |line: Line| ShipmentLine {
            sku: line.sku,
            quantity: line.quantity,
            returned_quantity: 0,
        };
        let shipment = Self {
            id,
            order_id: new.order_id,
            warehouse: new.warehouse,
            carrier: new.carrier,
            tracking_number: None,
            status: Status::Open,
            sequence: 1,
            reason: None,
            lines: lines.into_iter().map(not_returned).collect(),
            created_at: now,
            updated_at: now,
            completed_at: None,
        };
        Changed { shipment, event }
    }

    /// What a command does to this shipment at `now`.
    ///
    /// # Errors
    /// A [`Refusal`] for the caller to show; the shipment stays as it is.
    pub fn decide(&self, command: &Command, now: OffsetDateTime) -> Result<Decision, Refusal> {
        let changed = match command {
            Command::Complete { tracking_number } if self.status == Status::Completed => {
                return self.complete_again(tracking_number.as_deref());
            }
            Command::Complete { tracking_number } => self.complete(tracking_number.as_deref(), now),
            Command::Hold { reason } => self.hold(reason, now),
            Command::Release => self.release(now),
            Command::Cancel { reason } => self.cancel(reason, now),
            Command::Return { reason, lines } => self.take_back(reason, lines.as_deref(), now),
        };
        changed.map(|changed| Decision::Changed(Box::new(changed)))
    }

    fn complete(&self, tracking_number: Option<&str>, now: OffsetDateTime) -> Result<Changed, Refusal> {
        self.must_be("complete", &[Status::Open], "open")?;
        let tracking_number = tracking_number.map_or_else(|| self.label_number(), str::to_owned);
        let event = ShipmentEvent::Completed(ShipmentCompleted {
            order_id: self.order_id.clone(),
            warehouse: self.warehouse.clone(),
            carrier: self.carrier.clone(),
            tracking_number: tracking_number.clone(),
            lines: self.all_lines(),
            completed_at: now,
        });
        let shipment = Self {
            status: Status::Completed,
            tracking_number: Some(tracking_number),
            completed_at: Some(now),
            ..self.next(now)
        };
        Ok(Changed { shipment, event })
    }

    /// A repetition is harmless, unless it means another parcel.
    fn complete_again(&self, tracking_number: Option<&str>) -> Result<Decision, Refusal> {
        match (&self.tracking_number, tracking_number) {
            (Some(recorded), Some(given)) if recorded != given => Err(Refusal::OtherTrackingNumber {
                recorded: recorded.clone(),
            }),
            _ => Ok(Decision::AlreadyCompleted),
        }
    }

    fn hold(&self, reason: &str, now: OffsetDateTime) -> Result<Changed, Refusal> {
        self.must_be("hold", &[Status::Open], "open")?;
        let event = ShipmentEvent::Held(ShipmentHeld {
            order_id: self.order_id.clone(),
            warehouse: self.warehouse.clone(),
            carrier: self.carrier.clone(),
            reason: reason.to_owned(),
            lines: self.all_lines(),
            held_at: now,
        });
        let shipment = Self {
            status: Status::OnHold,
            reason: Some(reason.to_owned()),
            ..self.next(now)
        };
        Ok(Changed { shipment, event })
    }

    fn release(&self, now: OffsetDateTime) -> Result<Changed, Refusal> {
        self.must_be("release", &[Status::OnHold], "on hold")?;
        let event = ShipmentEvent::Released(ShipmentReleased {
            order_id: self.order_id.clone(),
            warehouse: self.warehouse.clone(),
            carrier: self.carrier.clone(),
            lines: self.all_lines(),
            released_at: now,
        });
        let shipment = Self {
            status: Status::Open,
            reason: None,
            ..self.next(now)
        };
        Ok(Changed { shipment, event })
    }

    fn cancel(&self, reason: &str, now: OffsetDateTime) -> Result<Changed, Refusal> {
        self.must_be("cancel", &[Status::Open, Status::OnHold], "open or on hold")?;
        let event = ShipmentEvent::Cancelled(ShipmentCancelled {
            order_id: self.order_id.clone(),
            warehouse: self.warehouse.clone(),
            carrier: self.carrier.clone(),
            reason: reason.to_owned(),
            lines: self.all_lines(),
            cancelled_at: now,
        });
        let shipment = Self {
            status: Status::Cancelled,
            reason: Some(reason.to_owned()),
            ..self.next(now)
        };
        Ok(Changed { shipment, event })
    }

    /// A part may come back more than once; the shipment is returned when nothing is left out.
    fn take_back(&self, reason: &str, lines: Option<&[Line]>, now: OffsetDateTime) -> Result<Changed, Refusal> {
        self.must_be("return", &[Status::Completed], "completed")?;
        let returned = match lines {
            Some(lines) => lines.to_vec(),
            None => self.lines_left(),
        };
        let mut shipment = self.next(now);
        for (index, line) in returned.iter().enumerate() {
            shipment.take_back_line(index, line)?;
        }
        if shipment.lines.iter().all(|line| line.left() == 0) {
            shipment.status = Status::Returned;
        }
        shipment.reason = Some(reason.to_owned());
        let event = ShipmentEvent::Returned(ShipmentReturned {
            order_id: self.order_id.clone(),
            warehouse: self.warehouse.clone(),
            carrier: self.carrier.clone(),
            tracking_number: self.tracking_number.clone().unwrap_or_else(|| self.label_number()),
            reason: reason.to_owned(),
            lines: returned,
            returned_at: now,
        });
        Ok(Changed { shipment, event })
    }

    fn take_back_line(&mut self, index: usize, returned: &Line) -> Result<(), Refusal> {
        let Some(line) = self.lines.iter_mut().find(|line| line.sku == returned.sku) else {
            return Err(Refusal::UnknownSku {
                line: index,
                sku: returned.sku.clone(),
            });
        };
        if returned.quantity > line.left() {
            return Err(Refusal::ReturnsTooMany {
                line: index,
                sku: returned.sku.clone(),
                asked: returned.quantity,
                left: line.left(),
            });
        }
        line.returned_quantity += returned.quantity;
        Ok(())
    }

    fn must_be(&self, command: &'static str, allowed: &[Status], needed: &'static str) -> Result<(), Refusal> {
        if allowed.contains(&self.status) {
            return Ok(());
        }
        Err(Refusal::WrongStatus {
            command,
            status: self.status,
            needed,
        })
    }

    /// The same shipment, one event later.
    fn next(&self, now: OffsetDateTime) -> Self {
        Self {
            sequence: self.sequence + 1,
            updated_at: now,
            ..self.clone()
        }
    }

    fn all_lines(&self) -> Vec<Line> {
        let line = |line: &ShipmentLine| Line {
            sku: line.sku.clone(),
            quantity: line.quantity,
        };
        self.lines.iter().map(line).collect()
    }

    fn lines_left(&self) -> Vec<Line> {
        let left = self.lines.iter().filter(|line| line.left() > 0);
        let line = |line: &ShipmentLine| Line {
            sku: line.sku.clone(),
            quantity: line.left(),
        };
        left.map(line).collect()
    }

    /// The number on the warehouse's own label, e.g. `LS-0000010248`.
    fn label_number(&self) -> String {
        format!("LS-{:010}", self.id)
    }
}

#[cfg(test)]
mod tests;
