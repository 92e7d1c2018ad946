//! What a client is told when something is wrong, in the form that OpenAI's clients read.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use serde_json::{Value, json};

use crate::load::Model;
use crate::scheduler::Refused;
use crate::session;

/// An answer that is an error: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The status of HTTP.
    pub status: StatusCode,
    /// What is wrong, what was found, what was expected.
    pub message: String,
    /// OpenAI's kind of error.
    pub kind: &'static str,
    /// The field that is at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// Seconds after which it is worth trying again.
    pub retry_after: Option<u32>,
}

impl ApiError {
    /// With nothing but a status and a message.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ApiError {
            status,
            message: message.into(),
            kind,
            param: None,
            code: None,
            retry_after: None,
        }
    }

    /// The request is at fault.
    pub fn invalid(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// A field of the request is at fault.
    pub fn field(param: &str, message: impl Into<String>) -> Self {
        ApiError {
            param: Some(param.into()),
            ..ApiError::invalid(message)
        }
    }

    /// There is no such thing.
    pub fn missing(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::NOT_FOUND, message)
    }

    /// The server or the model is at fault.
    pub fn internal(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// Not now.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        ApiError {
            code: Some(code),
            retry_after: Some(1),
            ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message)
        }
    }

    /// The same with a word for programs.
    pub fn with_code(self, code: &'static str) -> Self {
        ApiError {
            code: Some(code),
            ..self
        }
    }

    /// Why the engine does not take a request on.
    pub fn refused(error: &session::Error) -> Self {
        let told = ApiError::invalid(error.to_string());
        match error {
            session::Error::Refused(Refused::TooLong { .. } | Refused::TooManyPages { .. }) => {
                ApiError {
                    param: Some("prompt".into()),
                    ..told.with_code("context_length_exceeded")
                }
            }
            session::Error::Refused(_)
            | session::Error::TokenOutside { .. }
            | session::Error::Sampling(_) => told,
            _ => ApiError::internal(error.to_string()),
        }
    }

    /// Why a step went wrong.
    pub fn failed(error: session::Error, model: &Model) -> Self {
        ApiError::internal(format!("{:#}", model.explain(error.into())))
    }

    /// The object that the client gets.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, JSON);
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

/// The type of what clients are answered.
pub const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A JSON object as an answer.
pub fn json_response(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
}
