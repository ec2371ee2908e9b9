//! In the place of the synchronous path in a build without it.

use outbox::NewEvent;
use sqlx::{PgConnection, PgPool, PgTransaction};
use time::OffsetDateTime;
use uuid::Uuid;

/// Never works, and says so.
#[derive(Debug)]
pub(crate) struct Legacy(());

impl Legacy {
    /// # Errors
    /// None.
    pub(crate) fn new(_: &str) -> anyhow::Result<Self> {
        Ok(Self(()))
    }

    /// # Errors
    /// None.
    pub(crate) async fn inability(&self, _: &PgPool) -> Result<Option<String>, sqlx::Error> {
        Ok(Some("this build has no synchronous path (feature legacy)".to_owned()))
    }

    /// # Errors
    /// None.
    pub(crate) async fn take_effect(&self, _: &mut PgTransaction<'_>, _: &[&NewEvent]) -> Result<(), sqlx::Error> {
        Ok(())
    }

    /// # Errors
    /// None.
    pub(crate) async fn try_out(&self, _: &mut PgTransaction<'_>, _: &[&NewEvent]) -> Result<(), sqlx::Error> {
        Ok(())
    }

    /// # Errors
    /// None.
    pub(crate) async fn compare(&self, _: &PgPool) -> Result<bool, sqlx::Error> {
        Ok(false)
    }

    /// # Errors
    /// None.
    pub(crate) async fn commerce_health(
        &self,
        _: &mut PgConnection,
        _: &[Uuid],
        _: OffsetDateTime,
    ) -> Result<(i64, bool), sqlx::Error> {
        Ok((0, false))
    }
}
