//! The table of routes, and those that need no engine.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::routing::{get, post};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Map, Value, json};

use super::error::{ApiError, json_response};
use super::fields::{Faults, Fields, parse};
use super::job::Command;
use super::metrics::lock;
use super::{Server, chat, completions, gate, page, responses};
use crate::ids::TokenId;
use crate::text::EncodeOptions;

/// All routes there are, as metrics name them.
pub const ROUTES: [&str; 18] = [
    "/",
    "/page/{file}",
    "/health",
    "/metrics",
    "/strata/state",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/v1/models/{model}",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/documents",
    "/v1/documents/{id}",
    "/v1/documents/{id}/ask",
    "/v1/tokenize",
    "/v1/detokenize",
];

type Answer = Result<Response<Body>, ApiError>;

/// All of the server's routes.
pub fn router(server: Arc<Server>) -> Router {
    let tokenize = || post(tokenize);
    let detokenize = || post(detokenize);
    Router::new()
        .route("/", get(page::index))
        .route("/page/{file}", get(page::file))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/strata/state", get(state))
        .route("/tokenize", tokenize())
        .route("/v1/tokenize", tokenize())
        .route("/detokenize", detokenize())
        .route("/v1/detokenize", detokenize())
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .route("/v1/completions", post(complete))
        .route("/v1/chat/completions", post(converse))
        .route("/v1/responses", post(respond))
        .route("/v1/embeddings", post(embed))
        .route("/v1/documents", get(list_documents).post(upload))
        .route("/v1/documents/{id}", get(document).delete(delete_document))
        .route("/v1/documents/{id}/ask", post(ask))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(axum::middleware::from_fn_with_state(
            server.clone(),
            gate::pass,
        ))
        .with_state(server)
}

async fn unknown(request: Request) -> ApiError {
    let path: String = request.uri().path().chars().take(200).collect();
    ApiError::missing(format!(
        "there is nothing at {path}; `strata serve --help` lists what there is"
    ))
}

async fn wrong_method(request: Request) -> ApiError {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("{path} does not take {method}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

fn with_type(text: impl Into<Body>, kind: &'static str) -> Response<Body> {
    let mut response = Response::new(text.into());
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

async fn health(State(server): State<Arc<Server>>) -> Response<Body> {
    let draining = server.is_draining();
    let mut response = json_response(&json!({
        "status": if draining { "draining" } else { "ready" },
        "model": server.options.names[0],
    }));
    if draining {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

async fn metrics(State(server): State<Arc<Server>>) -> Response<Body> {
    let picture = lock(&server.picture).clone();
    let text = server.metrics.text(&picture);
    with_type(text, "text/plain; version=0.0.4; charset=utf-8")
}

async fn state(State(server): State<Arc<Server>>) -> Response<Body> {
    let mut told = lock(&server.picture).json();
    told["model"] = server.about_model();
    told["queue"] = json!({
        "open": server.open(), "most": server.places,
    });
    told["draining"] = server.is_draining().into();
    told["uptime_seconds"] = server.started.elapsed().as_secs().into();
    json_response(&told)
}

async fn models(State(server): State<Arc<Server>>) -> Response<Body> {
    let all: Vec<Value> = server
        .options
        .names
        .iter()
        .map(|n| server.model_object(n))
        .collect();
    json_response(&json!({"object": "list", "data": all}))
}

async fn model(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Answer {
    let object = Map::from_iter([("model".to_string(), Value::from(name.as_str()))]);
    let faults = Faults::default();
    server.check_model(&Fields::new("", &object, &faults))?;
    Ok(json_response(&server.model_object(&name)))
}

async fn complete(State(server): State<Arc<Server>>, request: Request) -> Answer {
    let body = server.object(request).await?;
    completions::complete(server, body).await
}

async fn converse(State(server): State<Arc<Server>>, request: Request) -> Answer {
    let body = server.object(request).await?;
    chat::chat(server, body).await
}

async fn respond(State(server): State<Arc<Server>>, request: Request) -> Answer {
    let body = server.object(request).await?;
    responses::respond(server, body).await
}

async fn embed(State(server): State<Arc<Server>>, request: Request) -> Answer {
    let body = server.object(request).await?;
    let faults = Faults::default();
    server.check_model(&Fields::new("", &body, &faults))?;
    let message = format!(
        "{} is no embedding model: it was trained to continue text, and gives no vector for one",
        server.model.name
    );
    Err(ApiError::field("model", message).with_code("not_an_embedding_model"))
}

async fn tokenize(State(server): State<Arc<Server>>, request: Request) -> Answer {
    let body = server.object(request).await?;
    let reader = server.clone();
    let told = server.blocking(move || {
        let faults = Faults::default();
        let fields = Fields::new("", &body, &faults);
        // llama.cpp calls it `content`, vLLM `prompt`.
        let text = fields
            .text("content")
            .or_else(|| fields.text("prompt"))
            .or_else(|| fields.text("text"));
        let add_special = fields.flag("add_special").unwrap_or(false);
        let parse_special = fields.flag("parse_special").unwrap_or(true);
        let pieces = fields.flag("with_pieces").unwrap_or(false);
        if text.is_none() && faults.finish().is_ok() {
            fields.fault("content", "expected a text to cut into tokens");
        }
        faults.finish()?;
        let options = EncodeOptions {
            add_special,
            parse_special,
        };
        let tokens = reader
            .tokenizer()?
            .encode_with(text.unwrap_or_default(), options);
        let tokens = tokens.map_err(|e| ApiError::invalid(e.to_string()))?;
        let count = tokens.len();
        let told: Value = if pieces {
            let piece = |id: &TokenId| json!({"id": id, "piece": reader.token_text(*id)});
            tokens.iter().map(piece).collect()
        } else {
            json!(tokens)
        };
        Ok(json!({"tokens": told, "count": count, "max_model_len": reader.context}))
    });
    Ok(json_response(&told.await?))
}

async fn detokenize(State(server): State<Arc<Server>>, request: Request) -> Answer {
    let body = server.object(request).await?;
    let reader = server.clone();
    let told = server.blocking(move || {
        let faults = Faults::default();
        let fields = Fields::new("", &body, &faults);
        let vocab = reader.model.network.graph.vocab;
        let empty = Vec::new();
        let list = fields.list("tokens");
        if fields.get("tokens").is_none() {
            fields.fault("tokens", "expected a list of token ids");
        }
        let ids = list
            .unwrap_or(&empty)
            .iter()
            .enumerate()
            .filter_map(|(i, id)| {
                let id_or_none = id.as_u64().and_then(|id| TokenId::try_from(id).ok());
                let found = id_or_none.filter(|id| (*id as usize) < vocab);
                if found.is_none() && faults.finish().is_ok() {
                    let what = format!("expected the id of one of {vocab} tokens");
                    fields.fault(&format!("tokens[{i}]"), what);
                }
                found
            });
        let ids: Vec<TokenId> = ids.collect();
        faults.finish()?;
        let text = reader.decode(&ids)?;
        Ok(json!({"content": text, "prompt": text}))
    });
    Ok(json_response(&told.await?))
}

/// Documents.
async fn list_documents(State(server): State<Arc<Server>>) -> Response<Body> {
    let all: Vec<Value> = server.library.list().iter().map(|d| d.json()).collect();
    json_response(&json!({"object": "list", "data": all}))
}

async fn document(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Answer {
    Ok(json_response(&server.library.get(&id)?.json()))
}

async fn upload(
    State(server): State<Arc<Server>>,
    Query(query): Query<BTreeMap<String, String>>,
    request: Request,
) -> Answer {
    server.refuse_if_draining()?;
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|v| v.to_str().ok()).unwrap_or_default();
    let is_json = kind.starts_with("application/json");
    if kind.starts_with("multipart/") {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "send the text itself as the body, its name as ?name=, or {\"name\", \"text\"} as JSON",
        ));
    }
    let bytes = server.body(request).await?;
    let worker = server.clone();
    let added = server.blocking(move || {
        let (name, text) = if is_json {
            let object = parse(&bytes)?;
            let faults = Faults::default();
            let fields = Fields::new("", &object, &faults);
            let name = fields.text("name").map(String::from);
            let text = fields.text("text").unwrap_or_default().to_string();
            faults.finish()?;
            (name, text)
        } else {
            let text = String::from_utf8(bytes.to_vec()).map_err(|error| {
                let at = error.utf8_error().valid_up_to();
                ApiError::invalid(format!("byte {at} of the document is no UTF-8 text"))
            })?;
            (query.get("name").cloned(), text)
        };
        if text.trim().is_empty() {
            return Err(ApiError::field("text", "the document is empty"));
        }
        worker.tokenizer()?;
        let name = name.unwrap_or_else(|| "document".into());
        let name = name.chars().filter(|c| !c.is_control()).take(200).collect();
        let now = worker.now();
        worker
            .library
            .add(&worker.model, worker.context, name, text, now)
    });
    let (reading, is_new) = added.await?;
    if is_new {
        server.command(Command::Read(reading.clone()))?;
    }
    let mut response = json_response(&reading.json());
    if is_new {
        *response.status_mut() = StatusCode::CREATED;
    }
    Ok(response)
}

async fn delete_document(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Answer {
    let reading = server.library.remove(&id)?;
    server.command(Command::Forget(reading))?;
    Ok(json_response(
        &json!({"id": id, "object": "document", "deleted": true}),
    ))
}

async fn ask(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
    request: Request,
) -> Answer {
    let body = server.object(request).await?;
    chat::ask(server, id, body).await
}

impl Server {
    /// The body of a request, if it comes in time and is not too large.
    async fn body(&self, request: Request) -> Result<Bytes, ApiError> {
        let most = self.options.max_body;
        let too_large = || {
            let message = format!("the body has more than {most} bytes (--max-body)");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
        };
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|l| l.to_str().ok()?.parse::<u64>().ok());
        if length.is_some_and(|length| length > most as u64) {
            return Err(too_large());
        }
        let seconds = self.options.read_timeout;
        let body = Limited::new(request.into_body(), most).collect();
        match tokio::time::timeout(Duration::from_secs(seconds), body).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => {
                Err(too_large())
            }
            Ok(Err(error)) => Err(ApiError::invalid(format!("the body broke off: {error}"))),
            Err(_) => {
                let message = format!("the body took longer than {seconds} s (--read-timeout)");
                Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
            }
        }
    }

    /// The object in the body of a request.
    async fn object(&self, request: Request) -> Result<Map<String, Value>, ApiError> {
        let bytes = self.body(request).await?;
        if bytes.len() < 64 << 10 {
            return parse(&bytes);
        }
        self.blocking(move || parse(&bytes)).await
    }

    fn model_object(&self, name: &str) -> Value {
        json!({
            "id": name, "object": "model", "created": self.created, "owned_by": "strata",
            "max_model_len": self.context,
        })
    }
}
