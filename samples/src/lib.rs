//! The sample data: Northwind's orders, their lines and the products, as typed rows that fit together.

/// The three files of `samples/northwind`.
pub mod northwind;

/// CSV rows and cells, each with its place, so that an error can name it.
mod table;

pub use table::{Reason, SampleError};
