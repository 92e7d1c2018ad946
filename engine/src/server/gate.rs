//! Who may ask: keys, hosts, origins; and the count of what was asked.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use axum::middleware::Next;
use axum::response::IntoResponse;

use super::Server;
use super::error::ApiError;
use super::routes::ROUTES;

/// What can be had without a key: nothing that a model says or has read.
const OPEN: [&str; 3] = ["/", "/page/{file}", "/health"];

/// Lets a request pass or not; counts its answer.
pub async fn pass(
    State(server): State<Arc<Server>>,
    request: Request,
    next: Next,
) -> Response<Body> {
    let matched = request.extensions().get::<MatchedPath>();
    let matched = matched.map_or("", MatchedPath::as_str);
    let route = ROUTES
        .into_iter()
        .find(|r| *r == matched)
        .unwrap_or("other");
    let origin = request.headers().get(header::ORIGIN).cloned();
    let mut response = match check(&server, route, &request) {
        Err(error) => error.into_response(),
        Ok(Allowed::Preflight) => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            response
        }
        Ok(Allowed::Request) => next.run(request).await,
    };
    if let Some(origin) = origin
        && server.allows_origin(&origin)
    {
        allow_origin(response.headers_mut(), origin);
    }
    server.metrics.answered(route, response.status().as_u16());
    response
}

enum Allowed {
    Request,
    /// A browser asks whether it may ask.
    Preflight,
}

fn check(server: &Server, route: &str, request: &Request) -> Result<Allowed, ApiError> {
    let headers = request.headers();
    let host = host_of(request);
    if server.loopback && !host.as_deref().is_none_or(is_local) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "this server listens on the machine itself only and is asked by another name, as a page could that has its name changed to this machine's address; use localhost or 127.0.0.1",
        ));
    }
    if let Some(origin) = headers.get(header::ORIGIN)
        && !server.allows_origin(origin)
        && !is_same(origin, headers.get(header::HOST))
    {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "a page of another origin asks; allow it with --cors ORIGIN",
        ));
    }
    let preflight = request.method() == Method::OPTIONS
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if preflight {
        return Ok(Allowed::Preflight);
    }
    if !OPEN.contains(&route) {
        check_key(&server.options.api_keys, headers)?;
    }
    Ok(Allowed::Request)
}

fn check_key(keys: &[String], headers: &HeaderMap) -> Result<(), ApiError> {
    if keys.is_empty() {
        return Ok(());
    }
    let refused = |message: &str| {
        let error = ApiError::new(StatusCode::UNAUTHORIZED, message);
        Err(error.with_code("invalid_api_key"))
    };
    let given = headers.get(header::AUTHORIZATION);
    let given = given.and_then(|value| value.to_str().ok());
    let Some(given) = given.and_then(|value| value.strip_prefix("Bearer ")) else {
        return refused("this server wants a key: send `Authorization: Bearer KEY`");
    };
    let mut known = false;
    for key in keys {
        known |= equal(key.as_bytes(), given.trim().as_bytes());
    }
    if known {
        Ok(())
    } else {
        refused("the key is not one of this server's")
    }
}

/// Whether two texts are the same, in a time that does not tell where they differ.
fn equal(a: &[u8], b: &[u8]) -> bool {
    let differ = a.iter().zip(b).fold(0, |differ, (a, b)| differ | (a ^ b));
    std::hint::black_box(differ) == 0 && a.len() == b.len()
}

fn host_of(request: &Request) -> Option<String> {
    let host = request.headers().get(header::HOST)?.to_str().ok()?;
    Some(host.to_ascii_lowercase())
}

/// Whether a `Host` names this machine: by number, or as localhost.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.parse::<IpAddr>().is_ok() || name == "localhost" || name.ends_with(".localhost")
}

/// Whether a page comes from the server itself.
fn is_same(origin: &HeaderValue, host: Option<&HeaderValue>) -> bool {
    let (Ok(origin), Some(Ok(host))) = (origin.to_str(), host.map(HeaderValue::to_str)) else {
        return false;
    };
    let after = origin.split_once("://").map(|(_, after)| after);
    after.is_some_and(|after| after.eq_ignore_ascii_case(host))
}

impl Server {
    fn allows_origin(&self, origin: &HeaderValue) -> bool {
        let mut allowed = self.options.cors.iter();
        allowed.any(|a| a == "*" || a.as_bytes() == origin.as_bytes())
    }
}

fn allow_origin(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    for (name, value) in [
        (header::VARY, "Origin"),
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, DELETE"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "authorization, *"),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_known_by_its_own_names_only() {
        for (host, local) in [
            ("localhost:8080", true),
            ("127.0.0.1", true),
            ("[::1]:8080", true),
            ("page.localhost", true),
            ("evil.example:8080", false),
            ("127.0.0.1.evil.example", false),
            ("", false),
        ] {
            assert_eq!(is_local(host), local, "{host}");
        }
    }

    #[test]
    fn a_page_is_the_servers_own_if_it_comes_from_the_host_that_is_asked() {
        let value = |text| HeaderValue::from_static(text);
        let host = value("localhost:8080");
        for (origin, same) in [
            ("http://localhost:8080", true),
            ("https://localhost:8080", true),
            ("http://localhost:8081", false),
            ("null", false),
        ] {
            assert_eq!(is_same(&value(origin), Some(&host)), same, "{origin}");
        }
    }

    #[test]
    fn keys_are_compared_whole() {
        assert!(equal(b"abc", b"abc") && equal(b"", b""));
        assert!(!equal(b"abc", b"ab") && !equal(b"ab", b"abc") && !equal(b"abc", b"abd"));
    }
}
