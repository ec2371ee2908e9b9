use axum::{
    extract::{FromRequestParts, Path, rejection::PathRejection},
    http::{StatusCode, request::Parts},
};
use service_runtime::problem::{self, Kind, Problem};

pub static ORDER_NOT_FOUND: Kind = Kind {
    code: "order-not-found",
    status: StatusCode::NOT_FOUND,
    title: "There is no such order",
    help: "The path names an order that commerce does not have.",
};
pub static PRODUCT_NOT_FOUND: Kind = Kind {
    code: "product-not-found",
    status: StatusCode::NOT_FOUND,
    title: "There is no such product",
    help: "The path names a sku that commerce does not sell.",
};
pub static SHIPMENT_NOT_FOUND: Kind = Kind {
    code: "shipment-not-found",
    status: StatusCode::NOT_FOUND,
    title: "Commerce knows no such shipment",
    help: "No event of this shipment has taken effect in commerce. If it was created a moment ago, ask again; otherwise \
           look for it in the retry and dead-letter topics.",
};

pub static LETTER_NOT_FOUND: Kind = Kind {
    code: "dead-letter-not-found",
    status: StatusCode::NOT_FOUND,
    title: "There is no such dead letter",
    help: "The path names no dead letter of this consumer group. `GET /admin/dead-letters` lists them.",
};

pub static LETTER_NOT_OPEN: Kind = Kind {
    code: "dead-letter-not-open",
    status: StatusCode::CONFLICT,
    title: "The dead letter is not open",
    help: "Only an open dead letter can be edited: this one is on its way again, was settled, is archived, or its event has taken \
           effect. Nothing was changed. `GET /admin/dead-letters/{id}` shows its state.",
};

pub static KEY_NOT_WAITING: Kind = Kind {
    code: "key-not-waiting",
    status: StatusCode::CONFLICT,
    title: "The key cannot go on without an event",
    help: "Only a key in the state `waiting` stands still for an event that has not come, and commerce must know its shipment. Nothing \
           was changed. `GET /admin/held-keys` lists the keys that are held.",
};

pub static REDRIVE_NOT_FOUND: Kind = Kind {
    code: "redrive-not-found",
    status: StatusCode::NOT_FOUND,
    title: "There is no such redrive",
    help: "The path names no redrive of this consumer group. `GET /admin/redrives` lists them.",
};

/// Longer ids exist nowhere in the product.
const MAX_ID_BYTES: usize = 255;

/// The id in the path. One that no table could hold is an id that nothing has.
#[derive(Debug)]
pub(super) struct Id(pub(super) String);

impl Id {
    pub(super) fn not_found(&self, kind: &'static Kind) -> Problem {
        Problem::new(kind, format!("{}: {:?}", kind.title, self.0))
    }

    /// Whether it may be asked of the database, which cannot hold NUL in a text.
    pub(super) fn is_possible(&self) -> bool {
        self.0.len() <= MAX_ID_BYTES && !self.0.contains('\0')
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(id) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|error: PathRejection| {
                Problem::new(
                    &problem::MALFORMED,
                    format!("the id in the path cannot be read: {error}"),
                )
            })?;
        Ok(Self(id))
    }
}

/// Of a read: whatever the database says, asking again is harmless.
pub(super) fn database(error: sqlx::Error) -> Problem {
    tracing::warn!(%error, "a read failed");
    Problem::new(
        &problem::UNAVAILABLE,
        "the database cannot be read now; repeat the request",
    )
}

/// Of a change by an operator: with its commit the connection may have been lost, so nobody knows (HAZARDS H1).
pub(super) fn write(error: sqlx::Error) -> Problem {
    tracing::warn!(%error, "a change by an operator failed");
    Problem::new(
        &problem::UNAVAILABLE,
        "the database did not confirm the change; look in /admin/actions if it was made before you repeat the request",
    )
}
