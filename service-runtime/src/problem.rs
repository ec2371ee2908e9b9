//! RFC 9457. Every error of every HTTP interface has this shape, also the ones of the framework: unknown paths, wrong
//! methods, too large bodies, panics.

use axum::{
    Router,
    extract::Path,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Serialize;
use utoipa::ToSchema;

/// One kind of problem. `code` and `title` never vary; what is particular goes into the detail.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// Stable short name; also the last part of the `type` URI.
    pub code: &'static str,
    pub status: StatusCode,
    pub title: &'static str,
    /// What it means and what to do, served at `GET /problems/{code}`.
    pub help: &'static str,
}

/// Kinds that any service answers with.
pub static COMMON: [&Kind; 12] = [
    &MALFORMED,
    &INVALID,
    &UNAUTHENTICATED,
    &FORBIDDEN,
    &NOT_FOUND,
    &METHOD_NOT_ALLOWED,
    &TOO_LARGE,
    &UNSUPPORTED_MEDIA_TYPE,
    &OVERLOADED,
    &TIMEOUT,
    &UNAVAILABLE,
    &INTERNAL,
];

pub static MALFORMED: Kind = Kind {
    code: "malformed-request",
    status: StatusCode::BAD_REQUEST,
    title: "The request cannot be read",
    help: "A header, a query parameter or the JSON itself is broken. The detail names the place. Nothing was changed.",
};
pub static INVALID: Kind = Kind {
    code: "invalid-request",
    status: StatusCode::UNPROCESSABLE_ENTITY,
    title: "The request is readable but not valid",
    help: "`errors` names each field by JSON Pointer with what is wrong. Nothing was changed.",
};
pub static UNAUTHENTICATED: Kind = Kind {
    code: "unauthenticated",
    status: StatusCode::UNAUTHORIZED,
    title: "A token is needed",
    help: "Send `Authorization: Bearer TOKEN` with one of the tokens that the setting ADMIN_TOKENS names.",
};
pub static FORBIDDEN: Kind = Kind {
    code: "forbidden",
    status: StatusCode::FORBIDDEN,
    title: "The token's role does not allow this",
    help: "The detail names the role that is needed. Nothing was changed.",
};
pub static NOT_FOUND: Kind = Kind {
    code: "not-found",
    status: StatusCode::NOT_FOUND,
    title: "There is nothing here",
    help: "The path or the id does not exist.",
};
pub static METHOD_NOT_ALLOWED: Kind = Kind {
    code: "method-not-allowed",
    status: StatusCode::METHOD_NOT_ALLOWED,
    title: "This path does not take that method",
    help: "The `Allow` header lists the methods of the path; `/openapi.json` describes them.",
};
pub static TOO_LARGE: Kind = Kind {
    code: "too-large",
    status: StatusCode::PAYLOAD_TOO_LARGE,
    title: "The request is too large",
    help: "The body exceeds the limit that the detail states. Split the request. Nothing was changed.",
};
pub static UNSUPPORTED_MEDIA_TYPE: Kind = Kind {
    code: "unsupported-media-type",
    status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
    title: "The body is not JSON",
    help: "Send `Content-Type: application/json`.",
};
pub static OVERLOADED: Kind = Kind {
    code: "overloaded",
    status: StatusCode::SERVICE_UNAVAILABLE,
    title: "Too many requests are in progress",
    help: "The request was refused before any work. Repeat it after `Retry-After` seconds.",
};
pub static TIMEOUT: Kind = Kind {
    code: "timeout",
    status: StatusCode::SERVICE_UNAVAILABLE,
    title: "The answer took too long",
    help: "The work may still be finished. Repeat the request with the same Idempotency-Key to learn the outcome.",
};
pub static UNAVAILABLE: Kind = Kind {
    code: "unavailable",
    status: StatusCode::SERVICE_UNAVAILABLE,
    title: "A dependency is away",
    help: "The database cannot be reached or is busy. Repeat the request, with an Idempotency-Key if it changes something.",
};
pub static INTERNAL: Kind = Kind {
    code: "internal",
    status: StatusCode::INTERNAL_SERVER_ERROR,
    title: "The service failed",
    help: "A defect. The log has the cause under the answer's `request_id`.",
};

/// An error response. The request's path and ids are filled in by [`crate::http`].
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    /// `/problems/{code}` of this service.
    #[serde(rename = "type")]
    pub problem_type: String,
    pub title: &'static str,
    pub status: u16,
    /// Stable short name of the kind.
    pub code: &'static str,
    /// What happened here and what to do next.
    pub detail: String,
    /// Path of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// The fields at fault.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    #[serde(skip)]
    retry_after_seconds: Option<u32>,
}

/// One field at fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// JSON Pointer (RFC 6901) into the body; `#header/NAME` or `#query/NAME` for what is not in it.
    pub pointer: String,
    pub code: &'static str,
    pub message: String,
}

impl Problem {
    pub fn new(kind: &'static Kind, detail: impl Into<String>) -> Self {
        let retryable = kind.status == StatusCode::SERVICE_UNAVAILABLE;
        Self {
            problem_type: format!("/problems/{}", kind.code),
            title: kind.title,
            status: kind.status.as_u16(),
            code: kind.code,
            detail: detail.into(),
            instance: None,
            request_id: None,
            trace_id: None,
            retryable,
            errors: Vec::new(),
            retry_after_seconds: retryable.then_some(1),
        }
    }

    #[must_use]
    pub fn field(mut self, pointer: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        self.errors.push(FieldError {
            pointer: pointer.into(),
            code,
            message: message.into(),
        });
        self
    }

    /// Says when the same request may succeed; sets `Retry-After`.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retryable = true;
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// A field that is readable but not valid, as a 422.
    pub fn invalid_field(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        let (pointer, message) = (pointer.into(), message.into());
        Self::new(&INVALID, format!("{pointer} {message}")).field(pointer, "invalid", message)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(&self)).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if status == StatusCode::UNAUTHORIZED {
            // RFC 6750, section 3.
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        // Kept beside the body, so that the outermost layer can add the request's ids to it.
        response.extensions_mut().insert(self);
        response
    }
}

/// `GET /problems/{code}`: what the `type` of a problem points to.
pub fn routes(own: &'static [&'static Kind]) -> Router {
    Router::new().route(
        "/problems/{code}",
        get(move |Path(code): Path<String>| async move {
            match own.iter().chain(COMMON.iter()).find(|kind| kind.code == code) {
                Some(kind) => {
                    format!("{} ({})\n\n{}\n\n{}\n", kind.title, kind.code, kind.status, kind.help).into_response()
                }
                None => Problem::new(&NOT_FOUND, format!("no problem has the code {code:?}")).into_response(),
            }
        }),
    )
}
