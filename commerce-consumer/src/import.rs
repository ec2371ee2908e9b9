use std::{collections::HashSet, path::Path};

use samples::northwind;
use sqlx::PgPool;

use crate::tables::{order_lines, orders, products};

/// How much an import has added; what was there before is left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Imported {
    pub orders: u64,
    pub lines: u64,
    pub products: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Names file, line and column; nothing was loaded.
    #[error(transparent)]
    Files(#[from] samples::SampleError),
    #[error("the database refused the import, nothing was loaded")]
    Database(#[from] sqlx::Error),
}

/// Takes over orders, lines and products from the CSV files in `dir`, in one transaction. Orders are paid and nothing of
/// them is shipped: all their pieces are committed. Safe to repeat.
///
/// # Errors
/// [`ImportError`]; nothing is loaded then.
pub async fn import(pool: &PgPool, dir: &Path) -> Result<Imported, ImportError> {
    let sample = northwind::load(dir)?;
    let mut transaction = pool.begin().await?;
    let products = products::insert_new(&mut transaction, &sample.products).await?;
    let new: HashSet<String> = orders::insert_new(&mut transaction, &sample.orders)
        .await?
        .into_iter()
        .collect();
    let lines: Vec<&northwind::OrderLine> = sample
        .lines
        .iter()
        .filter(|line| new.contains(&line.order_id.to_string()))
        .collect();
    let inserted = order_lines::insert(&mut transaction, &lines).await?;

    let mut committed = std::collections::BTreeMap::<String, products::StockChanges>::new();
    for line in lines {
        committed.entry(line.product_id.to_string()).or_default().committed += i64::from(line.quantity);
    }
    products::add(&mut transaction, &committed).await?;
    transaction.commit().await?;
    Ok(Imported {
        orders: new.len() as u64,
        lines: inserted,
        products,
    })
}
