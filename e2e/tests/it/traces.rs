use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use e2e::{
    ledger,
    pair::{Role, Running},
    place::Place,
    workload,
};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

const QUIET: Duration = Duration::from_secs(60);
const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// A client's trace goes on through request, relay and consumer, and each process exports its part.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_joins_request_publish_and_apply() -> anyhow::Result<()> {
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, 1).await?;
    let collector = Collector::start().await?;
    let settings = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str())];
    let api = Running::start(&place, Role::Api, &settings).await?;
    let relay = Running::start(&place, Role::Relay, &settings).await?;
    let consumer = Running::start(&place, Role::Consumer(0), &settings).await?;

    let body = json!({"order_id": "1", "warehouse": "main", "carrier": "Speedy",
                      "lines": [{"sku": "s2", "quantity": 1}]});
    let answer = reqwest::Client::new()
        .post(api.url("/v1/shipments"))
        .header("traceparent", format!("00-{TRACE_ID}-00f067aa0ba902b7-01"))
        .json(&body)
        .send()
        .await?;
    assert_eq!(answer.status(), 201);
    ledger::quiet(&owner, QUIET).await?;
    // Stopping sends what is buffered.
    for process in [api, relay, consumer] {
        process.stop().await?;
    }

    let trace_id = u128::from_str_radix(TRACE_ID, 16)?.to_be_bytes();
    let topic = place.topics.main();
    for span in [
        "POST /v1/shipments".to_owned(),
        format!("send {topic}"),
        format!("process {topic}"),
    ] {
        let exported = collector.contains_together(&[span.as_bytes(), &trace_id]);
        assert!(exported, "no export has the span {span:?} in the client's trace");
    }
    Ok(())
}

/// The receiving end of OTLP over HTTP: keeps the bodies, answers 200.
struct Collector {
    url: String,
    bodies: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Collector {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let bodies = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let kept = bodies.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let kept = kept.clone();
                tokio::spawn(async move {
                    if let Err(error) = receive(stream, &kept).await {
                        println!("collector: {error:#}");
                    }
                });
            }
        });
        Ok(Self { url, bodies })
    }

    fn contains_together(&self, parts: &[&[u8]]) -> bool {
        let bodies = self.bodies.lock().expect("no test thread panics with the lock");
        let has = |body: &[u8], part: &[u8]| body.windows(part.len()).any(|window| window == part);
        bodies.iter().any(|body| parts.iter().all(|part| has(body, part)))
    }
}

async fn receive(stream: TcpStream, bodies: &Mutex<Vec<Vec<u8>>>) -> anyhow::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut length = 0;
        let mut line = String::new();
        loop {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        bodies.lock().expect("no test thread panics with the lock").push(body);
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            .await?;
    }
}
