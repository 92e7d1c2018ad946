//! The page at `/`: its files, in the binary. They ask no other host for anything, and may not.

use axum::body::Body;
use axum::extract::Path;
use axum::http::{HeaderValue, Response, header};

use super::error::ApiError;

/// Its files by the names that it asks for, and their types.
const FILES: [(&str, &str, &str); 8] = [
    ("", HTML, include_str!("page/index.html")),
    (
        "style.css",
        "text/css; charset=utf-8",
        include_str!("page/style.css"),
    ),
    ("app.js", SCRIPT, include_str!("page/app.js")),
    ("api.js", SCRIPT, include_str!("page/api.js")),
    ("chat.js", SCRIPT, include_str!("page/chat.js")),
    ("documents.js", SCRIPT, include_str!("page/documents.js")),
    ("memory.js", SCRIPT, include_str!("page/memory.js")),
    ("parts.js", SCRIPT, include_str!("page/parts.js")),
];
const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// What the browser lets the page do: nothing that does not come from here. Its icon is data.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page itself.
pub async fn index() -> Result<Response<Body>, ApiError> {
    answer("")
}

/// One of its other files.
pub async fn file(Path(name): Path<String>) -> Result<Response<Body>, ApiError> {
    answer(&name)
}

fn answer(name: &str) -> Result<Response<Body>, ApiError> {
    let found = FILES.into_iter().find(|(known, ..)| *known == name);
    let (_, kind, text) = found.ok_or_else(|| {
        let name: String = name.chars().take(80).collect();
        ApiError::missing(format!("the page has no file {name:?}"))
    })?;
    let mut response = Response::new(Body::from(text));
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // With another binary comes another page.
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_asks_no_other_host_and_holds_no_markup_in_scripts() {
        for (name, _, text) in FILES {
            let text = text.replace("http://www.w3.org/2000/svg", ""); // a name, not a place
            for found in ["http:", "https:", "//cdn", "@import", "url("] {
                assert!(!text.contains(found), "{name}: {found}");
            }
            // What a model says must never become markup or code.
            for found in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "Function(",
            ] {
                assert!(!text.contains(found), "{name}: {found}");
            }
            for found in [" style=", " onclick=", "<script>", "<style>"] {
                assert!(
                    !text.contains(found),
                    "{name}: {found}: the policy forbids it"
                );
            }
        }
    }

    #[test]
    fn every_file_that_the_page_names_is_there() {
        for (name, _, text) in FILES {
            for line in text.lines() {
                let at = line.find("\"page/").map(|at| at + 6);
                let at = at.or_else(|| line.find("from \"./").map(|at| at + 8));
                if let Some(at) = at {
                    let file = line[at..].split('"').next().unwrap_or_default();
                    assert!(answer(file).is_ok(), "{name} asks for {file}");
                }
            }
        }
        assert!(answer("../Cargo.toml").is_err());
    }
}
