use clap::Parser;
use commerce_consumer::{config::GroupSettings, consume, http::Admin, import};
use devstack::testing::TestTopics;
use inbox::Outcome;
use rdkafka::{
    ClientConfig,
    producer::{FutureProducer, FutureRecord, Producer},
};
use shared_events::Envelope;
use tokio_util::sync::CancellationToken;

use crate::stage::{DEADLINE, Parcel, Stage, sample_dir, until};

#[derive(Parser)]
struct Group {
    #[command(flatten)]
    group: GroupSettings,
}

pub(crate) struct Consuming<'a> {
    stage: &'a Stage,
    pub(crate) admin: Admin,
    topics: TestTopics,
    producer: FutureProducer,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), inbox::EngineError>>,
}

impl<'a> Consuming<'a> {
    pub(crate) async fn start(stage: &'a Stage, delays: &str) -> Self {
        let tiers = if delays == "none" { 0 } else { delays.split(',').count() };
        let topics = TestTopics::create(&stage.servers, tiers, 4).await.unwrap();
        let topic = format!("--shipments-topic={}", topics.main());
        let group = format!("--commerce-group={}", topics.group());
        let settings = Group::parse_from(["test", &topic, &group, &format!("--retry-delays={delays}")]).group;
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", stage.servers.brokers())
            .set("partitioner", "murmur2_random");
        let engine = consume::engine(&settings, stage.pool.clone(), config.clone()).unwrap();
        let admin = stage.admin(&engine);
        let stop = CancellationToken::new();
        Self {
            stage,
            admin,
            topics,
            producer: config.create().unwrap(),
            task: tokio::spawn(engine.run(stop.clone())),
            stop,
        }
    }

    pub(crate) async fn send(&self, envelope: &Envelope) {
        let value = envelope.encode().unwrap();
        let record = FutureRecord::to(self.topics.main())
            .key(&envelope.aggregate_id)
            .payload(&value);
        self.producer.send(record, DEADLINE).await.unwrap();
    }

    fn waits_in_a_tier(&self) -> bool {
        let tier = self.topics.retry(1);
        let client = self.producer.client();
        // A partition that was created a moment ago may not have found its leader yet.
        (0..4).any(|partition| {
            client
                .fetch_watermarks(&tier, partition, DEADLINE)
                .is_ok_and(|(_, high)| high > 0)
        })
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_comes_before_its_order_waits_in_the_tiers_and_takes_effect_after_it() {
    let stage = Stage::empty().await;
    let consuming = Consuming::start(&stage, "300ms,600ms,900ms").await;
    let mut parcel = Parcel::new("1", "10248", &[("11", 12), ("42", 10), ("72", 5)]);
    consuming.send(&parcel.created()).await;
    until("the first failure", async || consuming.waits_in_a_tier()).await;
    import::import(&stage.pool, &sample_dir()).await.unwrap();
    until("the shipment", async || {
        stage.number("SELECT count(*) FROM commerce.shipments").await == 1
    })
    .await;
    consuming.send(&parcel.completed()).await;
    let shipped = "SELECT count(*) FROM commerce.orders WHERE id = '10248' AND status = 'shipped'";
    until("the effect", async || consuming.stage.number(shipped).await == 1).await;
    consuming.stop().await;
    assert_eq!(stage.number("SELECT count(*) FROM commerce.inbox").await, 2);
    let through = "SELECT count(*) FROM commerce.inbox WHERE topic LIKE '%.retry._'";
    assert_eq!(
        stage.number(through).await,
        1,
        "the inbox tells through which topic it came"
    );
    stage.assert_books_balance().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_synchronous_path_and_the_topic_bring_one_event_to_one_effect() {
    let stage = Stage::with_sample().await;
    let consuming = Consuming::start(&stage, "1h").await;
    let mut parcel = Parcel::new("1", "10248", &[("11", 12), ("42", 10), ("72", 5)]);
    let events = [parcel.created(), parcel.completed()];
    assert_eq!(stage.apply(&events).await, [Outcome::Applied, Outcome::Applied]);
    for event in &events {
        consuming.send(event).await;
    }
    until("the duplicates", async || {
        stage.number("SELECT count(*) FROM commerce.inbox").await == 2
    })
    .await;
    consuming.stop().await;
    assert_eq!(
        stage
            .number("SELECT sum(shipped_quantity)::bigint FROM commerce.order_lines")
            .await,
        27
    );
    stage.assert_books_balance().await;
}
