//! Parts of addresses, and proxies.

use super::Error;

pub(super) fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes()
        .map(|byte| {
            if plain(byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

/// Scheme and host of an address.
pub(super) fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    url[host..].find('/').map_or(url, |end| &url[..host + end])
}

pub(super) fn proxy(url: &str, no_proxy: Option<&str>) -> Result<ureq::Proxy, Error> {
    let build = || {
        let parsed = ureq::Proxy::new(url)?;
        let mut builder = ureq::Proxy::builder(parsed.protocol())
            .host(parsed.host())
            .port(parsed.port());
        if let Some(username) = parsed.username() {
            builder = builder.username(username);
        }
        if let Some(password) = parsed.password() {
            builder = builder.password(password);
        }
        for host in no_proxy
            .unwrap_or_default()
            .split(',')
            .chain(["localhost", "127.0.0.1"])
        {
            builder = builder.no_proxy(host.trim());
        }
        builder.build()
    };
    build().map_err(|error: ureq::Error| Error::Option {
        what: "the proxy",
        reason: format!("{url}: {error}"),
    })
}
