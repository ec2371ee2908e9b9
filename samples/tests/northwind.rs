//! The committed files are what the documentation says; broken copies are refused at the place that is wrong.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use samples::northwind::{Northwind, load};

const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/northwind");

#[test]
fn the_sample_has_the_documented_totals() {
    let sample = load(Path::new(DIR)).unwrap();
    let shipped = sample
        .orders
        .iter()
        .filter(|order| order.shipped_date.is_some())
        .count();
    assert_eq!(sample.orders.len(), 830);
    assert_eq!(sample.lines.len(), 2155);
    assert_eq!(sample.products.len(), 77);
    assert_eq!(shipped, 809);
    assert_eq!(sample.units_shipped(), 50_119);
    assert_eq!(sample.lines_by_order()[&10248].len(), 3);
}

/// Loads a copy in which `from` is replaced by `to` once in `file`.
fn load_broken(file: &str, from: &str, to: &str) -> Result<Northwind, String> {
    let dir = tempfile::tempdir().unwrap();
    for name in ["orders.csv", "order_lines.csv", "products.csv"] {
        let mut text = fs::read_to_string(Path::new(DIR).join(name)).unwrap();
        if name == file {
            assert!(text.contains(from), "{file} has no {from:?}");
            text = text.replacen(from, to, 1);
        }
        fs::write(dir.path().join(name), text).unwrap();
    }
    let prefix = format!("{}/", dir.path().display());
    load(dir.path()).map_err(|error| error.to_string().replace(&prefix, ""))
}

#[test]
fn each_wrong_value_is_named_by_file_line_and_column() {
    let cases = [
        (
            "orders.csv",
            "2012-07-16",
            "16.07.2012",
            "orders.csv, line 2, column `shipped_date`: `16.07.2012` is not a date such as 2012-07-04",
        ),
        (
            "orders.csv",
            "\n10249,",
            "\n10248,",
            "orders.csv, line 3, column `id`: id 10248 stands twice",
        ),
        (
            "orders.csv",
            "\n10249,TOMSP",
            "\nten,TOMSP",
            "orders.csv, line 3, column `id`: `ten` is not a whole number that fits",
        ),
        (
            "orders.csv",
            "\n10249,TOMSP",
            "\n10249,",
            "orders.csv, line 3, column `customer_id`: must not be empty",
        ),
        (
            "orders.csv",
            "\n10249,TOMSP,",
            "\n10249,",
            "orders.csv, line 3: is not CSV in UTF-8: the line has 9 cells, the header 10",
        ),
        (
            "orders.csv",
            "32.38",
            "1e3",
            "orders.csv, line 2, column `freight`: `1e3` is not a decimal number such as 12.50",
        ),
        (
            "orders.csv",
            "id,customer_id",
            "id,customer",
            "orders.csv: the header has no column `customer_id`",
        ),
        (
            "order_lines.csv",
            "10248,11,14,12,0",
            "10248,11,14,0,0",
            "order_lines.csv, line 2, column `quantity`: 0 is less than the 1 allowed",
        ),
        (
            "order_lines.csv",
            "10248,11,14,12,0",
            "10248,11,14,-3,0",
            "order_lines.csv, line 2, column `quantity`: -3 is less than the 1 allowed",
        ),
        (
            "order_lines.csv",
            "10248,11,14,12,0",
            "10248,11,14,99999999999,0",
            "order_lines.csv, line 2, column `quantity`: `99999999999` is not a whole number that fits",
        ),
        (
            "order_lines.csv",
            "10248,11,14,12,0",
            "7,11,14,12,0",
            "order_lines.csv, line 2, column `order_id`: there is no order 7 in orders.csv",
        ),
        (
            "order_lines.csv",
            "10248,11,14,12,0",
            "10248,9911,14,12,0",
            "order_lines.csv, line 2, column `product_id`: there is no product 9911 in products.csv",
        ),
        (
            "order_lines.csv",
            "10248,42,9.8",
            "10248,11,9.8",
            "order_lines.csv, line 3, column `product_id`: product 11 in order 10248 stands twice",
        ),
        (
            "products.csv",
            "\n2,Chang,19,17",
            "\n2,Chang,19,-17",
            "products.csv, line 3, column `units_in_stock`: -17 is less than the 0 allowed",
        ),
    ];
    for (file, from, to, expected) in cases {
        assert_eq!(load_broken(file, from, to).unwrap_err(), expected);
    }
}

#[test]
fn an_order_without_lines_is_refused() {
    let refusal = load_broken(
        "orders.csv",
        "\n10249,",
        "\n7,VINET,2012-07-04,2012-08-01,,Speedy Express,Vins,Reims,France,1.00\n10249,",
    );
    assert_eq!(refusal.unwrap_err(), "order_lines.csv: there is no line of order 7");
}

#[test]
fn a_missing_file_and_bytes_that_are_no_text_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing = load(dir.path()).unwrap_err().to_string();
    assert!(missing.contains("products.csv: cannot be read"), "{missing}");

    fs::write(
        dir.path().join("products.csv"),
        b"id,name,unit_price,units_in_stock,units_on_order,discontinued\n1,\xff,1,1,1,0\n",
    )
    .unwrap();
    let garbage = load(dir.path()).unwrap_err().to_string();
    assert!(
        garbage.contains("products.csv, line 2: is not CSV in UTF-8"),
        "{garbage}"
    );
}
