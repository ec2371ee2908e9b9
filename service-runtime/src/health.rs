use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use axum::{Json, Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use serde::Serialize;

/// A dependency that does not answer within this time counts as missing.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// What a component says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// The reason, in words for an operator.
    NotReady(String),
}

type Check = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Readiness> + Send>> + Send + Sync>;

struct Component {
    name: &'static str,
    required: bool,
    check: Check,
}

/// The components of a process, asked one by one at each request of `/health/ready`.
#[derive(Default)]
pub struct Health {
    components: Vec<Component>,
}

#[derive(Serialize)]
struct Report {
    status: &'static str,
    components: Vec<ComponentReport>,
}

#[derive(Serialize)]
struct ComponentReport {
    name: &'static str,
    status: &'static str,
    required: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Health {
    pub fn new() -> Self {
        Self::default()
    }

    /// A component without which the process cannot do its work: while it is missing, `/health/ready` answers 503.
    #[must_use]
    pub fn required<F, Fut>(self, name: &'static str, check: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Readiness> + Send + 'static,
    {
        self.with(name, true, check)
    }

    /// A component whose absence is shown but not waited for: logistics takes shipments while Kafka is away.
    #[must_use]
    pub fn degraded_without<F, Fut>(self, name: &'static str, check: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Readiness> + Send + 'static,
    {
        self.with(name, false, check)
    }

    fn with<F, Fut>(mut self, name: &'static str, required: bool, check: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Readiness> + Send + 'static,
    {
        let check: Check = Box::new(move || Box::pin(check()));
        self.components.push(Component { name, required, check });
        self
    }

    /// `/health/live` (the process runs) and `/health/ready` (what is missing).
    pub fn routes(self) -> Router {
        Router::new()
            .route(
                "/health/live",
                get(|| async { Json(serde_json::json!({"status": "live"})) }),
            )
            .route("/health/ready", get(ready))
            .with_state(Arc::new(self))
    }
}

async fn ready(State(health): State<Arc<Health>>) -> impl IntoResponse {
    let mut components = Vec::with_capacity(health.components.len());
    for component in &health.components {
        let readiness = tokio::time::timeout(CHECK_TIMEOUT, (component.check)())
            .await
            .unwrap_or_else(|_| Readiness::NotReady(format!("no answer within {CHECK_TIMEOUT:?}")));
        let (status, reason) = match readiness {
            Readiness::Ready => ("ready", None),
            Readiness::NotReady(reason) => ("not_ready", Some(reason)),
        };
        components.push(ComponentReport {
            name: component.name,
            status,
            required: component.required,
            reason,
        });
    }
    let missing = |required: bool| {
        components
            .iter()
            .any(|component| component.required == required && component.status != "ready")
    };
    let (code, status) = if missing(true) {
        (StatusCode::SERVICE_UNAVAILABLE, "not_ready")
    } else if missing(false) {
        (StatusCode::OK, "degraded")
    } else {
        (StatusCode::OK, "ready")
    };
    (code, Json(Report { status, components }))
}

/// Readiness of a database: it answers, and it is the primary. A standby may show another order of commits than the
/// primary (HAZARDS H64), and it takes no writes.
pub async fn database(pool: sqlx::PgPool) -> Readiness {
    match sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&pool).await {
        Ok(false) => Readiness::Ready,
        Ok(true) => Readiness::NotReady("the server is a standby".to_owned()),
        Err(error) => Readiness::NotReady(error.to_string()),
    }
}
