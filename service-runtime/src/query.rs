use axum::{extract::Query, http::Uri};

use crate::problem::{self, Problem};

/// A query string as name and value pairs, read strictly: a misspelt filter that is silently ignored means everything.
///
/// # Errors
/// A problem that says what cannot be read, or names the parameter that is given twice.
pub fn pairs(query: &str) -> Result<Vec<(String, String)>, Problem> {
    let unreadable = || Problem::new(&problem::MALFORMED, "the query string cannot be read");
    let uri = Uri::builder()
        .path_and_query(format!("/?{query}"))
        .build()
        .map_err(|_| unreadable())?;
    let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&uri).map_err(|_| unreadable())?;
    for (place, (name, _)) in pairs.iter().enumerate() {
        if pairs[..place].iter().any(|(earlier, _)| earlier == name) {
            return Err(wrong(name, "is given twice"));
        }
    }
    Ok(pairs)
}

/// A whole number from 1 to `most`.
///
/// # Errors
/// A problem that names the parameter.
pub fn limit(name: &str, value: &str, most: u16) -> Result<u16, Problem> {
    value
        .parse()
        .ok()
        .filter(|limit| (1..=most).contains(limit))
        .ok_or_else(|| wrong(name, &format!("is not a number from 1 to {most}")))
}

/// The problem of one parameter.
pub fn wrong(name: &str, message: &str) -> Problem {
    let shown: String = name.chars().take(40).collect();
    Problem::new(&problem::MALFORMED, format!("query parameter {shown:?} {message}")).field(
        format!("#query/{shown}"),
        "invalid",
        message,
    )
}
