use std::collections::{HashMap, HashSet};
use std::path::Path;

use time::Date;

use crate::table::{Reason, Row, SampleError, Table};

const ORDERS: &str = "orders.csv";
const ORDER_LINES: &str = "order_lines.csv";
const PRODUCTS: &str = "products.csv";

/// Bytes of an id or a short name.
const ID_LIMIT: usize = 64;
const NAME_LIMIT: usize = 200;

/// The whole sample. Every line belongs to an order and names a product of the same sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Northwind {
    pub orders: Vec<Order>,
    pub lines: Vec<OrderLine>,
    pub products: Vec<Product>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub id: i32,
    pub customer_id: String,
    pub order_date: Date,
    pub required_date: Date,
    /// `None` while the order waits in the warehouse.
    pub shipped_date: Option<Date>,
    pub carrier: String,
    pub ship_name: String,
    pub ship_city: String,
    pub ship_country: String,
    /// Decimal text.
    pub freight: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderLine {
    pub order_id: i32,
    pub product_id: i32,
    /// Decimal text.
    pub unit_price: String,
    /// At least 1.
    pub quantity: i32,
    /// Share of the price, decimal text: 0.05 is five percent.
    pub discount: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    pub id: i32,
    pub name: String,
    /// Decimal text.
    pub unit_price: String,
    pub units_in_stock: i32,
    pub units_on_order: i32,
    pub discontinued: bool,
}

/// Reads and checks the three files in `dir`.
///
/// Errors at the first cell that cannot be used, naming file, line and column: a wrong value, an id that stands twice,
/// a line of an unknown order or product, a quantity below 1, an order without lines.
pub fn load(dir: &Path) -> Result<Northwind, SampleError> {
    let products = products(&dir.join(PRODUCTS))?;
    let lines_file = dir.join(ORDER_LINES);
    let orders_file = dir.join(ORDERS);

    let product_ids: HashSet<i32> = products.iter().map(|product| product.id).collect();
    let orders = orders(&orders_file)?;
    let order_ids: HashSet<i32> = orders.iter().map(|order| order.id).collect();
    let lines = lines(&lines_file, &order_ids, &product_ids)?;

    let with_lines: HashSet<i32> = lines.iter().map(|line| line.order_id).collect();
    if let Some(order) = orders.iter().find(|order| !with_lines.contains(&order.id)) {
        return Err(SampleError::File {
            file: lines_file,
            reason: Reason::Unknown(format!("line of order {}", order.id)),
        });
    }
    Ok(Northwind {
        orders,
        lines,
        products,
    })
}

impl Northwind {
    /// Each order's lines, in the order of the file.
    pub fn lines_by_order(&self) -> HashMap<i32, Vec<&OrderLine>> {
        let mut by_order: HashMap<i32, Vec<&OrderLine>> = HashMap::new();
        for line in &self.lines {
            by_order.entry(line.order_id).or_default().push(line);
        }
        by_order
    }

    /// The sum of the quantities of all shipped orders.
    pub fn units_shipped(&self) -> i64 {
        let shipped: HashSet<i32> = self
            .orders
            .iter()
            .filter(|order| order.shipped_date.is_some())
            .map(|order| order.id)
            .collect();
        let lines = self.lines.iter().filter(|line| shipped.contains(&line.order_id));
        lines.map(|line| i64::from(line.quantity)).sum()
    }
}

fn orders(file: &Path) -> Result<Vec<Order>, SampleError> {
    const COLUMNS: [&str; 10] = [
        "id",
        "customer_id",
        "order_date",
        "required_date",
        "shipped_date",
        "carrier",
        "ship_name",
        "ship_city",
        "ship_country",
        "freight",
    ];
    let mut seen = HashSet::new();
    Table::open(file, &COLUMNS)?.rows(|row| {
        Ok(Order {
            id: unique_id(row, &mut seen)?,
            customer_id: row.bounded("customer_id", ID_LIMIT)?,
            order_date: row.date("order_date")?,
            required_date: row.date("required_date")?,
            shipped_date: row.optional_date("shipped_date")?,
            carrier: row.bounded("carrier", ID_LIMIT)?,
            ship_name: row.bounded("ship_name", NAME_LIMIT)?,
            ship_city: row.bounded("ship_city", NAME_LIMIT)?,
            ship_country: row.bounded("ship_country", NAME_LIMIT)?,
            freight: row.decimal("freight")?,
        })
    })
}

fn lines(file: &Path, orders: &HashSet<i32>, products: &HashSet<i32>) -> Result<Vec<OrderLine>, SampleError> {
    const COLUMNS: [&str; 5] = ["order_id", "product_id", "unit_price", "quantity", "discount"];
    let mut seen = HashSet::new();
    Table::open(file, &COLUMNS)?.rows(|row| {
        let line = OrderLine {
            order_id: row.integer("order_id", 1)?,
            product_id: row.integer("product_id", 1)?,
            unit_price: row.decimal("unit_price")?,
            quantity: row.integer("quantity", 1)?,
            discount: row.decimal("discount")?,
        };
        let OrderLine {
            order_id, product_id, ..
        } = line;
        if !orders.contains(&order_id) {
            return Err(row.error("order_id", Reason::Unknown(format!("order {order_id} in {ORDERS}"))));
        }
        if !products.contains(&product_id) {
            return Err(row.error(
                "product_id",
                Reason::Unknown(format!("product {product_id} in {PRODUCTS}")),
            ));
        }
        if !seen.insert((order_id, product_id)) {
            let what = format!("product {product_id} in order {order_id}");
            return Err(row.error("product_id", Reason::Duplicate(what)));
        }
        Ok(line)
    })
}

fn products(file: &Path) -> Result<Vec<Product>, SampleError> {
    const COLUMNS: [&str; 6] = [
        "id",
        "name",
        "unit_price",
        "units_in_stock",
        "units_on_order",
        "discontinued",
    ];
    let mut seen = HashSet::new();
    Table::open(file, &COLUMNS)?.rows(|row| {
        Ok(Product {
            id: unique_id(row, &mut seen)?,
            name: row.bounded("name", NAME_LIMIT)?,
            unit_price: row.decimal("unit_price")?,
            units_in_stock: row.integer("units_in_stock", 0)?,
            units_on_order: row.integer("units_on_order", 0)?,
            discontinued: row.integer::<i32>("discontinued", 0)? != 0,
        })
    })
}

fn unique_id(row: &Row<'_>, seen: &mut HashSet<i32>) -> Result<i32, SampleError> {
    let id = row.integer("id", 1)?;
    if seen.insert(id) {
        Ok(id)
    } else {
        Err(row.error("id", Reason::Duplicate(format!("id {id}"))))
    }
}
