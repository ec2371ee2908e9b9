use axum::{Router, http::header, routing::get};
use service_runtime::{
    http::HttpSettings,
    problem::{self, FieldError, Problem},
};
use utoipa::{OpenApi, openapi::OpenApi as Specification};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{change_shipments::ChangeShipments, find_shipments::FindShipments};

/// The opaque place in a list.
mod cursor;

/// Errors to problems, only here.
pub mod error;

/// What every changing request brings: key, path, body.
mod request;

/// The query of the list.
mod list_query;

/// JSON in and out.
mod representation;

/// Outcomes to answers.
mod answer;

/// The problem responses in the specification.
mod problems;

/// The routes of shipments.
mod shipments;

/// The routes of the outbox and its relay, for operators.
mod admin;

/// The routes of the flag, its roll-outs, and of what shadow mode found.
mod flag;

pub use admin::Admin;
pub use flag::FlagAdmin;

/// What the handlers work with.
#[derive(Debug, Clone)]
pub struct Api {
    pub changes: ChangeShipments,
    pub shipments: FindShipments,
    pub flag: FlagAdmin,
    /// Whether the endpoint of the load test is there.
    pub load_test: bool,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "logistics-svc",
        description = "Shipments of a warehouse. Every change is one event, committed with it and announced on Kafka.\n\n\
            Every POST takes an `Idempotency-Key` of 1 to 255 visible ASCII characters. A repetition with the same key, \
            path and body gets the first answer again, word for word, with `Idempotent-Replayed: true`. Answers of the \
            200 class are kept for 24 hours; a refused request changes nothing and is judged afresh.\n\n\
            Every error is an RFC 9457 problem; `GET /problems/{code}` explains its code."
    ),
    components(schemas(Problem, FieldError))
)]
struct Document;

/// The routes, those that clients must not be able to hold up, and the description of both, from one list.
fn routes(api: Option<Api>, admin: Admin) -> (Router, Router, Specification) {
    let mut document = Document::openapi();
    // The derive writes one with an empty name.
    document.info.license = None;
    let operators = OpenApiRouter::new()
        .routes(routes!(admin::relay))
        .routes(routes!(admin::outbox))
        .routes(routes!(admin::event))
        .routes(routes!(admin::resend))
        .with_state(admin);
    let document = OpenApiRouter::with_openapi(document).merge(operators);
    let Some(api) = api else {
        let (routes, described) = document.split_for_parts();
        return (routes, Router::new(), described);
    };
    // While requests are stuck on the synchronous path, this is the way out.
    let (flag, described) = OpenApiRouter::new()
        .routes(routes!(flag::read, flag::set))
        .routes(routes!(flag::history))
        .routes(routes!(flag::roll_out, flag::roll_outs))
        .routes(routes!(flag::compared))
        .with_state(api.flag.clone())
        .split_for_parts();
    let load_test = match api.load_test {
        true => OpenApiRouter::new().routes(routes!(shipments::append_only)),
        false => OpenApiRouter::new(),
    };
    let shipments = load_test
        .routes(routes!(shipments::list, shipments::create))
        .routes(routes!(shipments::create_many))
        .routes(routes!(shipments::complete_many))
        .routes(routes!(shipments::read))
        .routes(routes!(shipments::complete))
        .routes(routes!(shipments::hold))
        .routes(routes!(shipments::release))
        .routes(routes!(shipments::cancel))
        .routes(routes!(shipments::take_back))
        .with_state(api);
    let (routes, mut description) = document.merge(shipments).split_for_parts();
    description.merge(described);
    (routes, flag, description)
}

/// The whole HTTP interface; a process that only relays has no `api`. `operations` are the routes of health and metrics.
pub fn app(api: Option<Api>, admin: Admin, operations: Router, settings: &HttpSettings) -> Router {
    let (routes, flag, specification) = routes(api, admin);
    let description = specification.to_json().unwrap_or_default();
    let openapi = get(move || async move { ([(header::CONTENT_TYPE, "application/json")], description) });
    let unlimited = operations
        .merge(service_runtime::http::apart(flag, settings))
        .merge(problem::routes(&error::KINDS))
        .route("/openapi.json", openapi);
    service_runtime::http::app(routes, unlimited, settings)
}
