use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Bytes,
    extract::{FromRequest, MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use clap::Args;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use opentelemetry::{KeyValue, metrics::Histogram};
use serde::de::DeserializeOwned;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;
use uuid::Uuid;

use crate::{
    problem::{self, Problem},
    stalled::EndsWhenStalled,
    telemetry::{self, REQUEST_SPAN, TRACE_TARGET},
};

static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Seconds, for every latency histogram of the product.
pub const LATENCY_BUCKETS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];

#[derive(Debug, Clone, Args)]
pub struct HttpSettings {
    /// Largest request body in bytes; larger ones get a 413.
    #[arg(long, env = "HTTP_MAX_BODY_BYTES", default_value = "4194304")]
    pub http_max_body_bytes: usize,
    /// Longest time for one answer, e.g. `15s`; afterwards the client gets a 503 while the work is finished.
    #[arg(long, env = "HTTP_TIMEOUT", default_value = "15s", value_parser = humantime::parse_duration)]
    pub http_timeout: Duration,
    /// Longest time for a client to send its request head, e.g. `10s`; afterwards the connection is closed.
    #[arg(long, env = "HTTP_HEADER_TIMEOUT", default_value = "10s", value_parser = humantime::parse_duration)]
    pub http_header_timeout: Duration,
    /// Longest time for a client to take nothing of its answer, e.g. `10s`; afterwards the connection is closed.
    #[arg(long, env = "HTTP_WRITE_TIMEOUT", default_value = "10s", value_parser = humantime::parse_duration)]
    pub http_write_timeout: Duration,
    /// Most requests in progress, counted; more get a 503 at once.
    #[arg(long, env = "HTTP_MAX_CONCURRENT_REQUESTS", default_value = "512")]
    pub http_max_concurrent_requests: usize,
    /// Most open connections, counted; further ones wait to be accepted.
    #[arg(long, env = "HTTP_MAX_CONNECTIONS", default_value = "4096")]
    pub http_max_connections: usize,
}

#[derive(Clone)]
struct Limits {
    requests: Arc<Semaphore>,
    timeout: Duration,
    max_body_bytes: usize,
}

/// Requests of operators that are answered at once.
const OPERATORS_AT_ONCE: usize = 16;

/// Gives routes a limit of their own, which the requests of clients cannot use up: for what is needed while those are stuck. To be
/// merged into the `unlimited` routes of [`app`].
pub fn apart(routes: Router, settings: &HttpSettings) -> Router {
    let limits = Limits {
        requests: Arc::new(Semaphore::new(OPERATORS_AT_ONCE)),
        timeout: settings.http_timeout,
        max_body_bytes: settings.http_max_body_bytes,
    };
    routes.layer(middleware::from_fn_with_state(limits, limit))
}

/// Wraps the service's routes into limits, ids, metrics and problem responses. `unlimited` routes (health, metrics)
/// answer also when the service is busy.
pub fn app(api: Router, unlimited: Router, settings: &HttpSettings) -> Router {
    let limits = Limits {
        requests: Arc::new(Semaphore::new(settings.http_max_concurrent_requests)),
        timeout: settings.http_timeout,
        max_body_bytes: settings.http_max_body_bytes,
    };
    let durations = opentelemetry::global::meter("http")
        .f64_histogram("http.server.request.duration")
        .with_unit("s")
        .with_description("Time from the request's head to its answer")
        .with_boundaries(LATENCY_BUCKETS.to_vec())
        .build();
    api.layer(middleware::from_fn_with_state(limits, limit))
        .merge(unlimited)
        .fallback(|| async { Problem::new(&problem::NOT_FOUND, "no such path; /openapi.json lists them") })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                &problem::METHOD_NOT_ALLOWED,
                "see the Allow header for the methods of this path",
            )
        })
        .layer(CatchPanicLayer::custom(|panic: Box<dyn std::any::Any + Send>| {
            let message = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            tracing::error!(message, "a request handler panicked");
            Problem::new(&problem::INTERNAL, "a defect; see the log under this request_id").into_response()
        }))
        .layer(middleware::from_fn_with_state(durations, correlate))
}

/// Refuses what is too much before any work, and bounds the wait for an answer.
async fn limit(State(limits): State<Limits>, mut request: Request, next: Next) -> Response {
    let Ok(_permit) = limits.requests.try_acquire() else {
        return Problem::new(
            &problem::OVERLOADED,
            "too many requests are in progress; repeat this one",
        )
        .into_response();
    };
    request.extensions_mut().insert(MaxBody(limits.max_body_bytes));
    match tokio::time::timeout(limits.timeout, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(
            &problem::TIMEOUT,
            format!(
                "no answer within {:?}; repeat with the same Idempotency-Key",
                limits.timeout
            ),
        )
        .into_response(),
    }
}

/// Gives the request its ids and span, and its answer the same ids, one metric and, on failure, one log line.
async fn correlate(State(durations): State<Histogram<f64>>, request: Request, next: Next) -> Response {
    let started = std::time::Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "unmatched".to_owned(), |matched| matched.as_str().to_owned());
    let request_id = request
        .headers()
        .get(&REQUEST_ID)
        .filter(|value| (1..=128).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic))
        .cloned()
        .unwrap_or_else(|| {
            HeaderValue::from_str(&Uuid::now_v7().to_string()).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
        });
    let span = tracing::info_span!(target: TRACE_TARGET, REQUEST_SPAN, otel.name = format!("{method} {route}"),
        otel.kind = "server", http.request.method = %method, http.route = route);
    if let Some(parent) = request
        .headers()
        .get("traceparent")
        .and_then(|value| value.to_str().ok())
    {
        telemetry::set_parent(&span, parent);
    }
    let trace_id = telemetry::traceparent(&span).and_then(|text| text.get(3..35).map(str::to_owned));
    let id_text = request_id.to_str().unwrap_or("unknown").to_owned();
    // Every line that is logged on behalf of this request carries its ids, whoever logs it.
    let lines = tracing::info_span!("request", request_id = id_text, trace_id);

    let mut response = next.run(request).instrument(span).instrument(lines).await;

    let status = response.status();
    durations.record(
        started.elapsed().as_secs_f64(),
        &[
            KeyValue::new("http.request.method", known_method(&method)),
            KeyValue::new("http.route", route),
            KeyValue::new("http.response.status_code", i64::from(status.as_u16())),
        ],
    );
    // A probe that says "not ready" is an answer, repeated every few seconds; what is missing logs itself where it fails.
    if status.is_server_error() && !path.starts_with("/health/") {
        tracing::warn!(%method, path, status = status.as_u16(), request_id = id_text, trace_id, "request failed");
    } else {
        tracing::debug!(%method, path, status = status.as_u16(), request_id = id_text, trace_id, "request answered");
    }
    if let Some(mut problem) = response.extensions_mut().remove::<Problem>() {
        problem.instance = Some(path);
        problem.request_id = Some(id_text);
        problem.trace_id = trace_id;
        let allow = response.headers().get(header::ALLOW).cloned();
        response = problem.into_response();
        if let Some(allow) = allow {
            response.headers_mut().insert(header::ALLOW, allow);
        }
    }
    response.headers_mut().insert(REQUEST_ID.clone(), request_id);
    response
}

/// Any token is a method to HTTP; as the value of a label only those that are known may count (OpenTelemetry's `_OTHER`).
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "_OTHER",
    }
}

#[derive(Clone, Copy)]
struct MaxBody(usize);

/// A JSON body, with errors that name the field: 415 not JSON, 413 too large, 400 broken, 422 of the wrong shape.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        let body = JsonBody::from_request(request, _state).await?;
        body.parse().map(Self)
    }
}

/// The bytes of a JSON body, unparsed; for handlers that also need the bytes themselves.
#[derive(Debug, Clone)]
pub struct JsonBody(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        let max = request.extensions().get::<MaxBody>().map_or(usize::MAX, |max| max.0);
        let too_large = || {
            Problem::new(
                &problem::TOO_LARGE,
                format!("the body exceeds the limit of {max} bytes; split it"),
            )
        };
        let declared = request
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.parse::<usize>().ok());
        if declared.is_some_and(|length| length > max) {
            return Err(too_large());
        }
        let content_type = request.headers().get(header::CONTENT_TYPE).cloned();
        let bytes = axum::body::to_bytes(request.into_body(), max).await.map_err(|error| {
            if is_length_limit(&error) {
                too_large()
            } else {
                Problem::new(&problem::MALFORMED, format!("the body could not be read: {error}"))
            }
        })?;
        // An empty body needs no type: `curl -X POST` sends none.
        if !bytes.is_empty() && !content_type.as_ref().is_some_and(is_json) {
            return Err(Problem::new(
                &problem::UNSUPPORTED_MEDIA_TYPE,
                "send Content-Type: application/json",
            ));
        }
        Ok(Self(bytes))
    }
}

impl JsonBody {
    /// Reads the bytes as `T`.
    ///
    /// # Errors
    /// A problem that names line and column of broken JSON, or the pointer of a field with the wrong shape.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        if self.0.is_empty() {
            return Err(Problem::new(
                &problem::MALFORMED,
                "the body is empty; send a JSON object",
            ));
        }
        // serde reads an array as a struct, by position; nobody means that.
        if self.0.trim_ascii_start().first() == Some(&b'[') {
            return Err(
                Problem::new(&problem::INVALID, "the body: expected a JSON object, got an array").field(
                    "",
                    "invalid",
                    "expected a JSON object",
                ),
            );
        }
        let mut reader = serde_json::Deserializer::from_slice(&self.0);
        let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let pointer = pointer(error.path());
            let error = error.into_inner();
            if error.is_data() {
                let message = without_position(&error.to_string());
                Problem::new(&problem::INVALID, format!("{}: {message}", shown(&pointer)))
                    .field(pointer, "invalid", message)
            } else {
                Problem::new(&problem::MALFORMED, format!("the body is not JSON: {error}"))
            }
        })?;
        reader
            .end()
            .map_err(|error| Problem::new(&problem::MALFORMED, format!("the body is not JSON: {error}")))?;
        Ok(value)
    }

    /// Like [`JsonBody::parse`], with the default for an empty body.
    ///
    /// # Errors
    /// As [`JsonBody::parse`].
    pub fn parse_or_default<T: DeserializeOwned + Default>(&self) -> Result<T, Problem> {
        if self.0.is_empty() {
            Ok(T::default())
        } else {
            self.parse()
        }
    }
}

fn shown(pointer: &str) -> &str {
    if pointer.is_empty() { "the body" } else { pointer }
}

fn is_json(content_type: &HeaderValue) -> bool {
    let Ok(text) = content_type.to_str() else { return false };
    let mime = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    mime == "application/json" || (mime.starts_with("application/") && mime.ends_with("+json"))
}

fn is_length_limit(error: &axum::Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = source {
        if current.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        source = current.source();
    }
    false
}

/// RFC 6901.
fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter()
        .filter_map(|segment| match segment {
            Segment::Seq { index } => Some(format!("/{index}")),
            Segment::Map { key } => Some(format!("/{}", key.replace('~', "~0").replace('/', "~1"))),
            Segment::Enum { .. } | Segment::Unknown => None,
        })
        .collect()
}

/// serde_json appends "at line 1 column 17"; beside a pointer that is noise.
fn without_position(message: &str) -> String {
    message.split(" at line ").next().unwrap_or(message).to_owned()
}

/// Accepts connections until `stop`, then lets the requests in progress finish. The caller bounds that wait.
///
/// # Errors
/// Only if accepting fails for a reason other than one connection's own.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    settings: &HttpSettings,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let mut builder = hyper::server::conn::http1::Builder::new();
    // Without a timer a half-sent head keeps its connection for ever (HAZARDS H76).
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(settings.http_header_timeout);
    let connections = Arc::new(Semaphore::new(settings.http_max_connections));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &connections) => accepted?,
        };
        let (stream, _peer, permit) = accepted;
        let service = TowerToHyperService::new(app.clone());
        let stream = EndsWhenStalled::new(stream, settings.http_write_timeout);
        let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            // A client that hangs up or talks nonsense ends its own connection and nothing else.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(permit);
        });
    }
    // Refused at once, new clients go elsewhere; left open, the kernel would take them in and nobody would answer.
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> std::io::Result<(tokio::net::TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let permit = connections
        .clone()
        .acquire_owned()
        .await
        .map_err(std::io::Error::other)?;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Latency only; a client that is gone already shows at the first read.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, %peer, "no TCP_NODELAY");
                }
                return Ok((stream, peer, permit));
            }
            // The client was gone before we came to it, or the process is short of descriptors: neither ends the
            // server. The pause keeps the second case from spinning.
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// `GET /metrics`.
pub fn metrics_routes(telemetry: telemetry::Telemetry) -> Router {
    Router::new().route(
        "/metrics",
        axum::routing::get(move || {
            let telemetry = telemetry.clone();
            async move {
                match telemetry.prometheus() {
                    Ok(text) => (
                        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
                        text,
                    )
                        .into_response(),
                    Err(error) => {
                        tracing::error!(error = format!("{error:#}"), "metrics could not be written");
                        StatusCode::INTERNAL_SERVER_ERROR.into_response()
                    }
                }
            }
        }),
    )
}
