use std::{io, time::Duration};

use futures_util::{
    StreamExt, TryStreamExt,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use sqlx::{
    Describe, Either, Execute, Executor, PgPool, Postgres, SqlStr,
    pool::PoolConnection,
    postgres::{PgQueryResult, PgRow, PgStatement, PgTypeInfo},
};

/// Above the statement timeout: a server that is there has answered by then, if only with a refusal.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A pool whose questions end. A server that vanished without a reset never answers, and its own timeouts do not reach us;
/// a relay that waited for it would keep its leases through the renewals, and publish nothing.
#[derive(Debug, Clone)]
pub(crate) struct LimitedPool {
    pool: PgPool,
    limit: Duration,
}

impl From<PgPool> for LimitedPool {
    fn from(pool: PgPool) -> Self {
        Self {
            pool,
            limit: ANSWER_LIMIT,
        }
    }
}

/// A connection for one question. Dropped before the answer, by the limit or because nobody waits any more, it is closed. Else
/// it goes back within the limit: the pool asks the server once more before it lends the connection again, and would wait for
/// that answer for ever, with one connection less to lend.
struct Lent {
    connection: PoolConnection<Postgres>,
    limit: Duration,
    answered: bool,
}

impl LimitedPool {
    async fn lend(&self) -> Result<Lent, sqlx::Error> {
        Ok(Lent {
            connection: self.pool.acquire().await?,
            limit: self.limit,
            answered: false,
        })
    }
}

impl Lent {
    async fn answer<T>(
        answered: &mut bool,
        limit: Duration,
        question: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        match tokio::time::timeout(limit, question).await {
            Ok(answer) => {
                *answered = true;
                answer
            }
            Err(_) => Err(sqlx::Error::Io(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the database said nothing for {limit:?}"),
            ))),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.answered {
            tokio::spawn(tokio::time::timeout(self.limit, self.connection.return_to_pool()));
        } else {
            self.connection.close_on_drop();
        }
    }
}

impl<'c> Executor<'c> for &LimitedPool {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<PgQueryResult, PgRow>, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let pool = self.clone();
        let answer = async move {
            let mut lent = pool.lend().await?;
            let question = lent.connection.fetch_many(query).try_collect::<Vec<_>>();
            let rows = Lent::answer(&mut lent.answered, lent.limit, question).await?;
            Ok::<_, sqlx::Error>(stream::iter(rows.into_iter().map(Ok)))
        };
        stream::once(answer).try_flatten().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let pool = self.clone();
        Box::pin(async move {
            let mut lent = pool.lend().await?;
            let question = lent.connection.fetch_optional(query);
            Lent::answer(&mut lent.answered, lent.limit, question).await
        })
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<Describe<Postgres>, sqlx::Error>>
    where
        'c: 'e,
    {
        let pool = self.clone();
        Box::pin(async move {
            let mut lent = pool.lend().await?;
            let question = lent.connection.describe(sql);
            Lent::answer(&mut lent.answered, lent.limit, question).await
        })
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [PgTypeInfo],
    ) -> BoxFuture<'e, Result<PgStatement, sqlx::Error>>
    where
        'c: 'e,
    {
        let pool = self.clone();
        Box::pin(async move {
            let mut lent = pool.lend().await?;
            let question = lent.connection.prepare_with(sql, parameters);
            Lent::answer(&mut lent.answered, lent.limit, question).await
        })
    }
}

#[cfg(test)]
mod tests {
    use devstack::testing::TestServers;
    use sqlx::postgres::PgPoolOptions;
    use tokio::{
        io::copy_bidirectional,
        net::{TcpListener, TcpStream},
        sync::watch,
    };

    use super::*;

    /// The server's address is a proxy's that swallows what comes while told so, and keeps the connections open.
    #[tokio::test]
    async fn a_question_that_nobody_answers_ends_and_leaves_its_place_in_the_pool() -> anyhow::Result<()> {
        let mut url = url::Url::parse(&TestServers::from_env()?.superuser_url("postgres"))?;
        let server = format!("{}:{}", url.host_str().unwrap_or_default(), url.port().unwrap_or(5432));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        url.set_ip_host(address.ip()).ok();
        url.set_port(Some(address.port())).ok();
        let (silence, silent) = watch::channel(false);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (server, mut silent) = (server.clone(), silent.clone());
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(server).await else {
                        return;
                    };
                    let swallowed = tokio::select! {
                        told = silent.wait_for(|silent| *silent) => told.is_ok(),
                        _ = copy_bidirectional(&mut client, &mut server) => false,
                    };
                    if swallowed {
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .test_before_acquire(false)
            .connect(url.as_str())
            .await?;
        let pool = LimitedPool {
            pool,
            limit: Duration::from_millis(500),
        };
        assert_eq!(sqlx::query("SELECT 1").fetch_all(&pool).await?.len(), 1);
        tokio::time::timeout(Duration::from_secs(30), async {
            while pool.pool.num_idle() == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await?;

        silence.send(true)?;
        let unanswered = sqlx::query("SELECT 1").fetch_all(&pool).await;
        assert!(matches!(unanswered, Err(sqlx::Error::Io(_))), "{unanswered:?}");
        silence.send(false)?;
        assert_eq!(sqlx::query("SELECT 1").fetch_all(&pool).await?.len(), 1);
        Ok(())
    }
}
