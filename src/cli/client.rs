//! A small client for a running service: `send`, `health` and `demo` ask it as anybody else would.
//!
//! Promises: one request, one connection, a deadline; TLS with the public roots, or with the certificate that is named.

use std::{fmt::Write as _, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{io::AsyncRead, io::AsyncWrite, net::TcpStream};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// A running service.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    url: http::Uri,
    key: Option<String>,
    ca_pem: Option<Vec<u8>>,
    hint: Option<&'static str>,
}

/// What it said.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: http::StatusCode,
    pub(crate) body: Value,
}

impl Client {
    /// For the service at `url`, such as `http://127.0.0.1:8080`.
    pub(crate) fn new(url: &str, key: Option<String>, ca_file: Option<&Path>) -> anyhow::Result<Self> {
        let url: http::Uri =
            url.parse().with_context(|| format!("`{url}` is not an address such as http://127.0.0.1:8080"))?;
        if !matches!(url.scheme_str(), Some("http" | "https")) || url.host().is_none() {
            bail!("`{url}` is not an address such as http://127.0.0.1:8080");
        }
        let ca_pem = ca_file
            .map(|path| std::fs::read(path).with_context(|| format!("{} cannot be read", path.display())))
            .transpose()?;
        Ok(Self { url, key, ca_pem, hint: None })
    }

    /// With what to try when no answer comes.
    pub(crate) fn with_hint(self, hint: Option<&'static str>) -> Self {
        Self { hint, ..self }
    }

    /// The same without a key.
    pub(crate) fn without_key(&self) -> Self {
        Self { key: None, ..self.clone() }
    }

    /// Makes one request.
    pub(crate) async fn ask(&self, method: http::Method, path: &str, body: Option<Value>) -> anyhow::Result<Answer> {
        self.ask_as(method, path, body, None).await
    }

    /// Makes one request, which may be repeated under the same idempotency key.
    pub(crate) async fn ask_as(
        &self,
        method: http::Method,
        path: &str,
        body: Option<Value>,
        idempotency_key: Option<&str>,
    ) -> anyhow::Result<Answer> {
        let answer = tokio::time::timeout(PATIENCE, self.exchange(method, path, body, idempotency_key))
            .await
            .unwrap_or_else(|_| bail!("{} did not answer within {} s", self.url, PATIENCE.as_secs()));
        match (answer, self.hint) {
            (Err(error), Some(hint)) => bail!("{error:#}\nhint: {hint}"),
            (answer, _) => answer,
        }
    }

    async fn exchange(
        &self,
        method: http::Method,
        path: &str,
        body: Option<Value>,
        idempotency_key: Option<&str>,
    ) -> anyhow::Result<Answer> {
        let host = self.url.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let tls = self.url.scheme_str() == Some("https");
        let port = self.url.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let stream = TcpStream::connect((host.as_str(), port))
            .await
            .with_context(|| format!("nobody answers at {}: is `sonnette serve` running there?", self.url))?;
        let mut request = http::Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, self.url.authority().map_or_else(String::new, ToString::to_string))
            .header(http::header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(http::header::AUTHORIZATION, format!("Bearer {key}"));
        }
        if let Some(key) = idempotency_key {
            request = request.header("idempotency-key", key);
        }
        let body = body.map(|b| b.to_string()).unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(body)))?;
        if tls {
            let config = crate::apns::tls::client_config(self.ca_pem.as_deref())?;
            // The same roots as towards APNs; the API speaks HTTP/1.1 too.
            let mut config = (*config).clone();
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            let name = rustls::pki_types::ServerName::try_from(host)?;
            let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            send(stream, request).await
        } else {
            send(stream, request).await
        }
    }
}

async fn send<S>(stream: S, request: http::Request<Full<Bytes>>) -> anyhow::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        anyhow::Ok((status, body))
    };
    // The connection is driven beside the exchange, and ends with it.
    let (status, body) = tokio::select! {
        done = exchange => done?,
        ended = connection => {
            ended?;
            bail!("the connection was closed without an answer");
        }
    };
    let body =
        serde_json::from_slice(&body).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&body).into_owned()));
    Ok(Answer { status, body })
}

impl Answer {
    /// The body, if the status says that it went well.
    pub(crate) fn ok(self) -> anyhow::Result<Value> {
        if self.status.is_success() {
            return Ok(self.body);
        }
        let text = |field: &str| self.body.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut said = format!("{}: {} {}", self.status, text("title"), text("detail"));
        for fault in self.body.get("errors").and_then(Value::as_array).into_iter().flatten() {
            let text = |field: &str| fault.get(field).and_then(Value::as_str).unwrap_or_default();
            _ = write!(said, "\n  {}: {}", text("pointer"), text("detail"));
        }
        bail!(said)
    }
}
