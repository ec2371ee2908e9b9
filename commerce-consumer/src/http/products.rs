use axum::{Json, extract::State};
use serde::Serialize;
use service_runtime::problem::Problem;
use shared_events::envelope::rfc3339_micros;
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{
    Api,
    error::{Id, PRODUCT_NOT_FOUND, database},
    problems::ProductProblems,
};
use crate::tables::products;

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProductView {
    /// The sku.
    id: String,
    name: String,
    /// Decimal text.
    unit_price: String,
    /// Pieces that can be promised to the next customer.
    sellable: i64,
    /// Pieces promised and not shipped yet.
    committed: i64,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    updated_at: OffsetDateTime,
}

/// Read a product's stock.
#[utoipa::path(get, path = "/v1/products/{id}", operation_id = "readProduct", tag = "products",
    params(("id" = String, Path, description = "The sku", example = "11")),
    responses((status = 200, body = ProductView), ProductProblems))]
pub(super) async fn read(State(api): State<Api>, id: Id) -> Result<Json<ProductView>, Problem> {
    if !id.is_possible() {
        return Err(id.not_found(&PRODUCT_NOT_FOUND));
    }
    let row = products::find(&api.pool, &id.0).await.map_err(database)?;
    let row = row.ok_or_else(|| id.not_found(&PRODUCT_NOT_FOUND))?;
    Ok(Json(ProductView {
        id: row.sku,
        name: row.name,
        unit_price: row.unit_price,
        sellable: row.sellable,
        committed: row.committed,
        updated_at: row.updated_at,
    }))
}
