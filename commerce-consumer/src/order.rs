//! An order, pure: how its status follows from its lines.

use std::{collections::BTreeMap, fmt};

/// Where an order stands. It is never set by itself: [`Order::status`] derives it from the lines, and the row is written
/// in the transaction that changes a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrderStatus {
    Paid,
    PartiallyShipped,
    Shipped,
    Cancelled,
    Returned,
}

impl OrderStatus {
    pub const ALL: [Self; 5] = [
        Self::Paid,
        Self::PartiallyShipped,
        Self::Shipped,
        Self::Cancelled,
        Self::Returned,
    ];

    /// The name in the REST interface and in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Paid => "paid",
            Self::PartiallyShipped => "partially_shipped",
            Self::Shipped => "shipped",
            Self::Cancelled => "cancelled",
            Self::Returned => "returned",
        }
    }
}

impl fmt::Display for OrderStatus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// An order line, in pieces. 0 ≤ returned ≤ shipped and shipped + cancelled ≤ ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OrderLine {
    pub ordered: i32,
    pub shipped: i32,
    pub returned: i32,
    pub cancelled: i32,
}

impl OrderLine {
    /// Neither shipped nor cancelled yet.
    pub fn outstanding(&self) -> i32 {
        self.ordered - self.shipped - self.cancelled
    }

    /// Shipped and still with the customer.
    pub fn kept(&self) -> i32 {
        self.shipped - self.returned
    }
}

/// An order's lines by sku.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Order {
    pub lines: BTreeMap<String, OrderLine>,
}

impl Order {
    pub fn status(&self) -> OrderStatus {
        let sum = |part: fn(&OrderLine) -> i32| -> i64 { self.lines.values().map(|line| i64::from(part(line))).sum() };
        let (shipped, outstanding) = (sum(|line| line.shipped), sum(OrderLine::outstanding));
        match (shipped, outstanding) {
            (0, 0) if sum(|line| line.cancelled) > 0 => OrderStatus::Cancelled,
            (0, _) => OrderStatus::Paid,
            (_, 0) if sum(OrderLine::kept) == 0 => OrderStatus::Returned,
            (_, 0) => OrderStatus::Shipped,
            (_, _) => OrderStatus::PartiallyShipped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(lines: &[(i32, i32, i32, i32)]) -> Order {
        let line = |&(ordered, shipped, returned, cancelled)| OrderLine {
            ordered,
            shipped,
            returned,
            cancelled,
        };
        Order {
            lines: lines
                .iter()
                .enumerate()
                .map(|(sku, values)| (sku.to_string(), line(values)))
                .collect(),
        }
    }

    #[test]
    fn the_status_follows_from_the_lines() {
        let cases = [
            (order(&[]), OrderStatus::Paid),
            (order(&[(5, 0, 0, 0), (2, 0, 0, 0)]), OrderStatus::Paid),
            (order(&[(5, 0, 0, 5), (2, 0, 0, 0)]), OrderStatus::Paid),
            (order(&[(5, 3, 0, 0)]), OrderStatus::PartiallyShipped),
            (order(&[(5, 3, 3, 0)]), OrderStatus::PartiallyShipped),
            (order(&[(5, 5, 0, 0), (2, 0, 0, 0)]), OrderStatus::PartiallyShipped),
            (order(&[(5, 5, 0, 0), (2, 0, 0, 2)]), OrderStatus::Shipped),
            (order(&[(5, 3, 2, 2)]), OrderStatus::Shipped),
            (order(&[(5, 3, 3, 2)]), OrderStatus::Returned),
            (order(&[(5, 0, 0, 5), (2, 0, 0, 2)]), OrderStatus::Cancelled),
        ];
        for (order, status) in cases {
            assert_eq!(order.status(), status, "{order:?}");
        }
    }
}
