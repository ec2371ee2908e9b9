use axum::{
    extract::{FromRequest, FromRequestParts, Path, Request},
    http::{HeaderMap, request::Parts},
};
use service_runtime::{
    http::JsonBody,
    problem::{self, Problem},
};

use super::error;
use crate::idempotency::IdempotencyKey;

const HEADER: &str = "idempotency-key";
const MAX_KEY_BYTES: usize = 255;
/// An id that cannot be one is shown in the answer, but not all of it.
const MAX_SHOWN_CHARS: usize = 40;

/// The id in the path. What is not a positive bigint cannot exist: 404, as for any other unknown id.
#[derive(Debug)]
pub(super) struct ShipmentId(pub(super) i64);

impl<S: Send + Sync> FromRequestParts<S> for ShipmentId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Ok(Path(text)) = Path::<String>::from_request_parts(parts, state).await else {
            return Err(error::shipment_not_found("with a name that is not UTF-8"));
        };
        // `+1` and `01` parse, but one shipment has one path.
        match text.parse::<i64>() {
            Ok(id) if id >= 1 && id.to_string() == text => Ok(Self(id)),
            _ => {
                let shown: String = text.chars().take(MAX_SHOWN_CHARS).collect();
                Err(error::shipment_not_found(format_args!("{shown:?}")))
            }
        }
    }
}

/// What every changing request brings. The body is kept as bytes too: key, path and bytes are what a repetition repeats.
#[derive(Debug)]
pub(super) struct Posted {
    path: String,
    key: Option<String>,
    pub(super) body: JsonBody,
}

impl<S: Send + Sync> FromRequest<S> for Posted {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let key = read_key(request.headers())?;
        let path = request.uri().path().to_owned();
        let body = JsonBody::from_request(request, state).await?;
        Ok(Self { path, key, body })
    }
}

impl Posted {
    /// The key, if the client gave one, as that of operation `route`.
    pub(super) fn key(&self, route: &'static str) -> Option<IdempotencyKey> {
        let value = self.key.clone()?;
        Some(IdempotencyKey::new(route, value, &self.path, &self.body.0))
    }
}

fn read_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(HEADER).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(bad_key("is given twice"));
    }
    let bytes = value.as_bytes();
    if bytes.is_empty() || bytes.len() > MAX_KEY_BYTES {
        return Err(bad_key(&format!(
            "has {} bytes, allowed are 1 to {MAX_KEY_BYTES}",
            bytes.len()
        )));
    }
    match value.to_str() {
        Ok(text) if bytes.iter().all(u8::is_ascii_graphic) => Ok(Some(text.to_owned())),
        _ => Err(bad_key("contains something else than visible ASCII characters")),
    }
}

fn bad_key(message: &str) -> Problem {
    Problem::new(&problem::MALFORMED, format!("Idempotency-Key {message}")).field(
        "#header/Idempotency-Key",
        "invalid",
        message,
    )
}
