use sqlx::migrate::Migrator;

pub static MIGRATOR: Migrator = sqlx::migrate!("../migrations/logistics");
pub const SCHEMA: &str = "logistics";
