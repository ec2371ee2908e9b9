//! Outcomes to answers. They are made inside the transaction, so that a kept answer is the one that was given.

use axum::{
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use super::representation::{CompletionResults, ShipmentView, ShipmentsView};
use crate::{
    change_shipments::{ChangeError, Outcome},
    idempotency::Answer,
    shipment::Shipment,
};

static REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

pub(super) fn created_one(outcomes: &[Outcome]) -> Result<Answer, ChangeError> {
    let shipment = the_one(outcomes)?;
    let location = Some(format!("/v1/shipments/{}", shipment.id));
    answer(StatusCode::CREATED, location, &ShipmentView::from(shipment))
}

pub(super) fn created_many(outcomes: &[Outcome]) -> Result<Answer, ChangeError> {
    let items = outcomes.iter().map(|outcome| done(outcome).map(ShipmentView::from));
    let items = items.collect::<Result<_, _>>()?;
    answer(StatusCode::CREATED, None, &ShipmentsView { items })
}

pub(super) fn changed_one(outcomes: &[Outcome]) -> Result<Answer, ChangeError> {
    let shipment = the_one(outcomes)?;
    answer(StatusCode::OK, None, &ShipmentView::from(shipment))
}

pub(super) fn completed_many(outcomes: &[Outcome]) -> Result<Answer, ChangeError> {
    answer(StatusCode::OK, None, &CompletionResults::new(outcomes))
}

fn the_one(outcomes: &[Outcome]) -> Result<&Shipment, ChangeError> {
    match outcomes {
        [outcome] => done(outcome),
        _ => Err(ChangeError::Broken("a request for one shipment has not one outcome")),
    }
}

fn done(outcome: &Outcome) -> Result<&Shipment, ChangeError> {
    match outcome {
        Outcome::Changed(shipment) | Outcome::AlreadyCompleted(shipment) => Ok(shipment),
        Outcome::NotFound { id } => Err(ChangeError::NotFound { id: *id }),
        Outcome::Refused { id, refusal } => Err(ChangeError::Refused {
            id: *id,
            refusal: refusal.clone(),
        }),
    }
}

fn answer(status: StatusCode, location: Option<String>, body: &impl Serialize) -> Result<Answer, ChangeError> {
    Ok(Answer {
        status: status.as_u16(),
        location,
        body: serde_json::to_string(body)?,
    })
}

pub(super) fn response(answer: Answer) -> Response {
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::OK);
    let mut response = (status, [(header::CONTENT_TYPE, "application/json")], answer.body).into_response();
    if let Some(location) = answer.location.and_then(|path| HeaderValue::try_from(path).ok()) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

pub(super) fn replayed(answer: Answer) -> Response {
    let mut response = response(answer);
    response
        .headers_mut()
        .insert(REPLAYED.clone(), HeaderValue::from_static("true"));
    response
}
