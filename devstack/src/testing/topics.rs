use std::ops::Deref;

use shared_events::topics::{COMMERCE_GROUP, GroupTopics};
use uuid::Uuid;

use super::TestServers;
use crate::topics;

/// Main, retry and dead-letter topics of one test under a name of their own. Deleted when this value is dropped.
pub struct TestTopics {
    brokers: String,
    topics: GroupTopics,
    tiers: usize,
    /// By their broker, which others use too.
    outlived: bool,
}

impl TestTopics {
    /// `tiers` retry topics, `partitions` in every topic, the same settings as in a stack.
    pub async fn create(servers: &TestServers, tiers: usize, partitions: i32) -> anyhow::Result<Self> {
        let mut topics = Self::create_on(servers.brokers(), tiers, partitions).await?;
        topics.outlived = true;
        Ok(topics)
    }

    /// The same on a broker of the test's own; they go with it.
    pub async fn create_on(brokers: &str, tiers: usize, partitions: i32) -> anyhow::Result<Self> {
        // A group of its own as well: members of one group that subscribe to different topics share their rebalances.
        let unique = Uuid::now_v7().simple();
        let topics = GroupTopics::new(format!("t{unique}.shipments"), format!("{COMMERCE_GROUP}-{unique}"));
        topics::create(brokers, &topics, tiers, partitions).await?;
        Ok(Self {
            brokers: brokers.to_owned(),
            topics,
            tiers,
            outlived: false,
        })
    }

    pub fn group_topics(&self) -> &GroupTopics {
        &self.topics
    }
}

impl Deref for TestTopics {
    type Target = GroupTopics;

    fn deref(&self) -> &GroupTopics {
        &self.topics
    }
}

impl Drop for TestTopics {
    fn drop(&mut self) {
        if !self.outlived {
            return;
        }
        let deleted = topics::delete(&self.brokers, &self.topics, self.tiers);
        super::clean_up("the test topics", || deleted);
    }
}
