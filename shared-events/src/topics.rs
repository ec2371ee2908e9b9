/// All events of shipments; key = shipment id.
pub const SHIPMENTS: &str = "logistics.shipments";

/// The consumer group of the commerce service, and the name under which its inbox rows stand.
pub const COMMERCE_GROUP: &str = "commerce";

/// Partitions of every topic by default. Main, retry and dead-letter topics have equal counts, so that a key keeps its
/// partition number through the tiers.
pub const DEFAULT_PARTITIONS: i32 = 12;

/// A consumer group's own topics around the one it listens to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupTopics {
    main: String,
    group: String,
}

impl GroupTopics {
    pub fn new(main: impl Into<String>, group: impl Into<String>) -> Self {
        Self {
            main: main.into(),
            group: group.into(),
        }
    }

    pub fn main(&self) -> &str {
        &self.main
    }

    pub fn group(&self) -> &str {
        &self.group
    }

    /// The topic of retry tier `tier`, counted from 1: `logistics.shipments.commerce.retry.1`.
    pub fn retry(&self, tier: usize) -> String {
        format!("{}.{}.retry.{tier}", self.main, self.group)
    }

    /// The dead-letter topic: `logistics.shipments.commerce.dlt`.
    pub fn dead_letter(&self) -> String {
        format!("{}.{}.dlt", self.main, self.group)
    }

    /// Main topic, `tiers` retry topics, dead-letter topic.
    pub fn all(&self, tiers: usize) -> Vec<String> {
        let mut topics = vec![self.main.clone()];
        topics.extend((1..=tiers).map(|tier| self.retry(tier)));
        topics.push(self.dead_letter());
        topics
    }
}
