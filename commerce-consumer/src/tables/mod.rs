//! All SQL of the service, one file per table. Whoever changes rows locks them in this order, each table's rows in the
//! order of their keys: orders (and under them their lines and timelines), shipments, products. Several partitions
//! apply at once; one order of locks for all of them rules deadlocks out.

pub mod orders;

pub mod order_lines;

pub mod shipments;

pub mod order_timeline;

/// Hot: locked last and for the shortest time.
pub mod products;
