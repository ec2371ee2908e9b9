use sqlx::migrate::Migrator;

pub static MIGRATOR: Migrator = sqlx::migrate!("../migrations/commerce");
pub const SCHEMA: &str = "commerce";
