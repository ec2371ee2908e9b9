use std::fs;

use commerce_consumer::import::{ImportError, Imported, import};
use sqlx::Row;

use crate::stage::{Stage, sample_dir};

#[tokio::test]
async fn the_sample_is_taken_over_once_however_often_it_is_imported() {
    let stage = Stage::empty().await;
    let first = import(&stage.pool, &sample_dir()).await.unwrap();
    assert_eq!(
        first,
        Imported {
            orders: 830,
            lines: 2_155,
            products: 77
        }
    );
    let again = import(&stage.pool, &sample_dir()).await.unwrap();
    assert_eq!(again, Imported::default());
    assert_eq!(
        stage
            .number("SELECT count(*) FROM commerce.orders WHERE status = 'paid'")
            .await,
        830
    );
    assert_eq!(
        stage
            .number("SELECT count(*) FROM commerce.order_lines WHERE shipped_quantity = 0")
            .await,
        2_155
    );
    assert_eq!(
        stage
            .number("SELECT sum(committed)::bigint FROM commerce.products")
            .await,
        51_317
    );
    assert_eq!(
        stage
            .number("SELECT sellable FROM commerce.products WHERE sku = '1'")
            .await,
        39
    );
    stage.assert_books_balance().await;
}

#[tokio::test]
async fn a_broken_file_is_refused_by_its_place_and_loads_nothing() {
    let stage = Stage::empty().await;
    let dir = std::env::temp_dir().join(format!("broken-sample-{}", uuid::Uuid::new_v4().simple()));
    fs::create_dir(&dir).unwrap();
    for file in ["orders.csv", "order_lines.csv", "products.csv"] {
        let text = fs::read_to_string(sample_dir().join(file)).unwrap();
        fs::write(dir.join(file), text.replace("10249,14,18.6,9,0", "10249,14,18.6,-9,0")).unwrap();
    }
    let error = import(&stage.pool, &dir).await.unwrap_err();
    fs::remove_dir_all(&dir).unwrap();
    assert!(matches!(error, ImportError::Files(_)));
    let message = error.to_string();
    for part in ["order_lines.csv", "line 5", "quantity", "-9"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(stage.number("SELECT count(*) FROM commerce.products").await, 0);
}

#[tokio::test]
async fn the_service_may_do_what_it_needs_and_no_more() {
    let stage = Stage::with_sample().await;
    for refused in [
        "DELETE FROM commerce.orders",
        "DELETE FROM commerce.order_timeline",
        "UPDATE commerce.orders SET customer_id = 'x'",
        "UPDATE commerce.order_timeline SET kind = 'shipped'",
        "UPDATE commerce.products SET unit_price = 0",
        "UPDATE commerce.inbox SET sequence = 9",
        "TRUNCATE commerce.inbox",
        "DROP TABLE commerce.inbox",
        "CREATE TABLE commerce.mine (id int)",
        "INSERT INTO commerce._sqlx_migrations SELECT * FROM commerce._sqlx_migrations",
    ] {
        let error = sqlx::query(refused).execute(&stage.pool).await.unwrap_err();
        assert_eq!(error.as_database_error().unwrap().code().unwrap(), "42501", "{refused}");
    }
    let row = sqlx::query("SELECT current_user::text AS who")
        .fetch_one(&stage.pool)
        .await
        .unwrap();
    assert_eq!(row.get::<String, _>("who"), "commerce_svc");
}
