use axum::{Router, http::header, routing::get};
use service_runtime::{
    http::HttpSettings,
    problem::{self, FieldError, Kind, Problem},
};
use sqlx::PgPool;
use utoipa::{OpenApi, openapi::OpenApi as Specification};
use utoipa_axum::{router::OpenApiRouter, routes};

/// Errors to problems, only here; and the id in a path.
pub mod error;

/// The problem responses in the specification.
mod problems;

/// Consumer, held keys, dead letters, and what operators did.
mod admin;

mod orders;
mod products;
mod shipments;
mod summary;

pub use admin::Admin;

/// What the handlers work with.
#[derive(Debug, Clone)]
pub struct Api {
    pub pool: PgPool,
    /// The consumer group whose inbox rows are shown.
    pub group: String,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "commerce-consumer",
        description = "What commerce knows of orders, products and shipments; it changes by the warehouse's events alone. \
            Under `/admin`, how the consumer is doing, and what to do about dead letters.\n\nEvery error is an RFC 9457 problem; `GET /problems/{code}` explains its code."
    ),
    components(schemas(Problem, FieldError))
)]
struct Document;

/// The problems of this service beside the common ones.
static KINDS: [&Kind; 7] = [
    &error::KEY_NOT_WAITING,
    &error::LETTER_NOT_FOUND,
    &error::LETTER_NOT_OPEN,
    &error::ORDER_NOT_FOUND,
    &error::PRODUCT_NOT_FOUND,
    &error::REDRIVE_NOT_FOUND,
    &error::SHIPMENT_NOT_FOUND,
];

/// The routes and their description, from one list.
fn routes(api: Api, admin: Admin) -> (Router, Specification) {
    let operators = OpenApiRouter::new()
        .routes(routes!(admin::consumer::consumer))
        .routes(routes!(admin::consumer::pause))
        .routes(routes!(admin::consumer::resume))
        .routes(routes!(admin::consumer::limit))
        .routes(routes!(admin::held_keys::held_keys))
        .routes(routes!(admin::held_keys::pass))
        .routes(routes!(admin::dead_letters::letters))
        .routes(routes!(admin::dead_letters::groups))
        .routes(routes!(admin::dead_letters::letter))
        .routes(routes!(admin::edits::edit))
        .routes(routes!(admin::dry_runs::dry_run))
        .routes(routes!(admin::decisions::redrive))
        .routes(routes!(admin::decisions::skip))
        .routes(routes!(admin::archive::archive))
        .routes(routes!(admin::archive::restore))
        .routes(routes!(admin::redrives::list, admin::redrives::begin))
        .routes(routes!(admin::redrives::read))
        .routes(routes!(admin::redrives::cancel))
        .routes(routes!(admin::actions::actions))
        .with_state(admin);
    let commerce = OpenApiRouter::new()
        .routes(routes!(orders::read))
        .routes(routes!(products::read))
        .routes(routes!(shipments::read))
        .routes(routes!(summary::read))
        .with_state(api);
    OpenApiRouter::with_openapi(Document::openapi())
        .merge(commerce)
        .merge(operators)
        .split_for_parts()
}

/// What `/openapi.json` serves.
pub fn specification(api: Api, admin: Admin) -> Specification {
    routes(api, admin).1
}

/// The whole HTTP interface. `operations` are the routes of health and metrics.
pub fn app(api: Api, admin: Admin, operations: Router, settings: &HttpSettings) -> Router {
    let (routes, specification) = routes(api, admin);
    let description = specification.to_json().unwrap_or_default();
    let openapi = get(move || async move { ([(header::CONTENT_TYPE, "application/json")], description) });
    let unlimited = operations
        .merge(problem::routes(&KINDS))
        .route("/openapi.json", openapi);
    service_runtime::http::app(routes, unlimited, settings)
}
