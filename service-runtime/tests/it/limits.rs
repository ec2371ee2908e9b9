use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    routing::{get, post},
};
use clap::Parser;
use reqwest::StatusCode;
use service_runtime::http::{self, HttpSettings, JsonBody};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    http: HttpSettings,
}

struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<std::io::Result<()>>,
    /// Lets the handler of `/wait` go on.
    release: Arc<Notify>,
    entered: Arc<Notify>,
}

async fn start(arguments: &[&str]) -> Server {
    let settings = Settings::parse_from([&["server"], arguments].concat()).http;
    let (release, entered) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let api = Router::new()
        .route(
            "/echo",
            post(|body: JsonBody| async move { body.parse::<serde_json::Value>().map(axum::Json) }),
        )
        .route(
            "/panic",
            get(|| async {
                if true {
                    panic!("secret detail")
                }
            }),
        )
        .route("/large", get(|| async { vec![b'x'; 64 << 20] }))
        .route(
            "/wait",
            get({
                let (release, entered) = (release.clone(), entered.clone());
                move || async move {
                    entered.notify_one();
                    release.notified().await;
                    "done"
                }
            }),
        );
    let unlimited = Router::new().route("/health/live", get(|| async { "live" }));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let task = tokio::spawn({
        let stop = stop.clone();
        async move { http::serve(listener, http::app(api, unlimited, &settings), &settings, stop).await }
    });
    Server {
        address,
        stop,
        task,
        release,
        entered,
    }
}

impl Server {
    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

/// Status, code and whether the body is a problem document with the request's path and id.
async fn problem(response: reqwest::Response) -> (StatusCode, String) {
    let status = response.status();
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let path = response.url().path().to_owned();
    let body: serde_json::Value = response.json().await.unwrap();
    assert_eq!(body["request_id"], id);
    assert_eq!(body["instance"], path);
    assert_eq!(body["status"], status.as_u16());
    assert!(!body.to_string().contains("secret"), "{body}");
    (status, body["code"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_error_is_a_problem_document() {
    let server = start(&["--http-max-body-bytes=1000"]).await;
    let client = reqwest::Client::new();
    let json = |body: String| {
        client
            .post(server.url("/echo"))
            .header("content-type", "application/json")
            .body(body)
    };
    let expect = async |request: reqwest::RequestBuilder, status: u16, code: &str| {
        let (actual, actual_code) = problem(request.send().await.unwrap()).await;
        assert_eq!((actual.as_u16(), actual_code.as_str()), (status, code));
    };
    expect(client.get(server.url("/nowhere")), 404, "not-found").await;
    expect(client.delete(server.url("/echo")), 405, "method-not-allowed").await;
    expect(
        client.post(server.url("/echo")).body("{}"),
        415,
        "unsupported-media-type",
    )
    .await;
    expect(json("{\"a\":".to_owned()), 400, "malformed-request").await;
    expect(json("{} {}".to_owned()), 400, "malformed-request").await;
    expect(json("[".repeat(500)), 422, "invalid-request").await;
    expect(json(format!("{{\"a\":{}}}", "[".repeat(500))), 400, "malformed-request").await;
    expect(json("x".repeat(1_001)), 413, "too-large").await;
    let chunks = futures_of(2_000);
    let chunked = client
        .post(server.url("/echo"))
        .header("content-type", "application/json")
        .body(chunks);
    expect(chunked, 413, "too-large").await;
    expect(client.get(server.url("/panic")), 500, "internal").await;
    // The server still works after all that.
    assert_eq!(
        json("{\"a\":1}".to_owned()).send().await.unwrap().text().await.unwrap(),
        "{\"a\":1}"
    );
}

/// A body whose length is not declared.
fn futures_of(bytes: usize) -> reqwest::Body {
    reqwest::Body::wrap(http_body_util::StreamBody::new(OneByOne(bytes)))
}

struct OneByOne(usize);

impl futures_util::Stream for OneByOne {
    type Item = Result<http_body::Frame<axum::body::Bytes>, std::io::Error>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let left = self.0;
        self.0 = left.saturating_sub(100);
        std::task::Poll::Ready((left > 0).then(|| Ok(http_body::Frame::data(vec![b' '; 100].into()))))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_beyond_the_limit_is_refused_at_once_and_health_answers() {
    let server = start(&["--http-max-concurrent-requests=1"]).await;
    let first = tokio::spawn(reqwest::get(server.url("/wait")));
    server.entered.notified().await;
    let refused = reqwest::get(server.url("/wait")).await.unwrap();
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(problem(refused).await.1, "overloaded");
    assert_eq!(
        reqwest::get(server.url("/health/live"))
            .await
            .unwrap()
            .text()
            .await
            .unwrap(),
        "live"
    );
    server.release.notify_one();
    assert_eq!(first.await.unwrap().unwrap().text().await.unwrap(), "done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_takes_too_long_is_a_503() {
    let server = start(&["--http-timeout=50ms"]).await;
    let (status, code) = problem(reqwest::get(server.url("/wait")).await.unwrap()).await;
    assert_eq!((status.as_u16(), code.as_str()), (503, "timeout"));
}

/// HAZARDS H76: without a timer a half-sent head keeps its connection for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_sent_head_loses_its_connection() {
    let server = start(&["--http-header-timeout=100ms"]).await;
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket
        .write_all(b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-slow: ")
        .await
        .unwrap();
    let mut rest = Vec::new();
    let closed = timeout(DEADLINE, socket.read_to_end(&mut rest)).await;
    assert!(closed.is_ok(), "the connection is still open");
}

/// HAZARDS H76: one that never reads would keep its connection, here the only one, from everybody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_takes_nothing_of_its_answer_loses_its_connection() {
    let server = start(&["--http-max-connections=1", "--http-write-timeout=100ms"]).await;
    let mut deaf = TcpStream::connect(server.address).await.unwrap();
    deaf.write_all(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let other = timeout(DEADLINE, reqwest::get(server.url("/health/live"))).await;
    assert_eq!(other.expect("its turn comes").unwrap().text().await.unwrap(), "live");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_finishes_the_requests_in_progress() {
    let server = start(&[]).await;
    let request = tokio::spawn(reqwest::get(server.url("/wait")));
    server.entered.notified().await;
    server.stop.cancel();
    // New connections are refused while the old request ends well.
    let refused = async {
        while TcpStream::connect(server.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, refused).await.unwrap();
    server.release.notify_one();
    assert_eq!(request.await.unwrap().unwrap().text().await.unwrap(), "done");
    timeout(DEADLINE, server.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_are_taken_over_or_made() {
    let server = start(&[]).await;
    let client = reqwest::Client::new();
    let ask = async |id: Option<&str>| {
        let mut request = client.get(server.url("/health/live"));
        if let Some(id) = id {
            request = request.header("x-request-id", id);
        }
        request.send().await.unwrap().headers()["x-request-id"]
            .to_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(ask(Some("mine-1")).await, "mine-1");
    assert_ne!(ask(None).await, ask(None).await);
    let too_long = "x".repeat(129);
    assert_ne!(ask(Some(&too_long)).await, too_long);
}
