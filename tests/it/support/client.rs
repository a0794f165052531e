//! An HTTP client as the callers of the API have it: HTTP/2 with prior knowledge, JSON, an API key.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client as Legacy, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
    pub(crate) text: String,
    /// Its stream came to an end without an error.
    pub(crate) is_whole: bool,
}

impl Answer {
    /// The body of an answer that must have gone well.
    #[track_caller]
    pub(crate) fn ok(self) -> Value {
        assert!(self.status.is_success(), "{}: {}", self.status, self.text);
        self.body
    }

    /// The pointers of all faults that it lists.
    pub(crate) fn pointers(&self) -> Vec<&str> {
        let errors = self.body["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
        errors.iter().filter_map(|e| e["pointer"].as_str()).collect()
    }

    /// A header's text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// A caller.
#[derive(Clone)]
pub(crate) struct Client {
    http: Legacy<HttpConnector, Full<Bytes>>,
    base: String,
    key: Option<String>,
}

impl Client {
    /// Speaks HTTP/2 with prior knowledge.
    pub(crate) fn new(address: SocketAddr, key: Option<&str>) -> Self {
        let http = Legacy::builder(TokioExecutor::new()).http2_only(true).build_http();
        Self { http, base: format!("http://{address}"), key: key.map(str::to_owned) }
    }

    /// Speaks HTTP/1.1.
    pub(crate) fn new_http1(address: SocketAddr) -> Self {
        let http = Legacy::builder(TokioExecutor::new()).build_http();
        Self { http, base: format!("http://{address}"), key: None }
    }

    /// Its key.
    pub(crate) fn key(&self) -> &str {
        self.key.as_deref().unwrap_or_default()
    }

    /// The same caller with another key.
    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self.clone() }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, &[], String::new()).await.expect("an answer")
    }

    /// Every item of a list, page by page.
    pub(crate) async fn all(&self, path: &str) -> Vec<Value> {
        let joint = if path.contains('?') { '&' } else { '?' };
        let (mut items, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = self.get(&format!("{path}{joint}limit=1000{cursor}")).await.ok();
            items.extend(page["items"].as_array().unwrap().iter().cloned());
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return items,
            }
        }
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, &[], String::new()).await.expect("an answer")
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::POST, path, &[], body.to_string()).await.expect("an answer")
    }

    /// Any request; `None` if no answer came in time.
    pub(crate) async fn send_within(
        &self,
        patience: Duration,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Option<Answer> {
        tokio::time::timeout(patience, self.send(method, path, headers, body)).await.ok()?.ok()
    }

    /// Any request; an error if no answer came.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Result<Answer, hyper_util::client::legacy::Error> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.http.request(request.body(Full::new(Bytes::from(body))).unwrap()).await?;
        let (head, body) = response.into_parts();
        let body = body.collect().await.map(http_body_util::Collected::to_bytes);
        let is_whole = body.is_ok();
        let bytes = body.unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
            text,
            is_whole,
        })
    }
}
