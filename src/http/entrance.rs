//! What the listener asks: the router, and past it the one request that comes by the thousands.
//!
//! Promises: `POST /v1/notifications` is answered as the router would answer it, by the same handler within the same frame.
//! A router finds the path, copies what serves it and passes the request on through half a dozen layers, each of which
//! moves it and some of which take memory for it: a twentieth of what `serve` did for a notification.

use std::{convert::Infallible, sync::Arc};

use axum::{Router, body::Body, response::Response};
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Either},
};
use http::{Method, Request};
use hyper::{body::Incoming, service::Service};
use hyper_util::service::TowerToHyperService;

use super::{
    Shared,
    request::{Pattern, frame},
    v1::notifications,
};

/// The way in. Cloning shares it.
#[derive(Clone)]
pub struct Entrance {
    router: TowerToHyperService<Router>,
    /// Whose notifications go past the router.
    straight: Option<Shared>,
}

impl Entrance {
    /// Everything by the router.
    pub(super) fn by(router: Router) -> Self {
        Self { router: TowerToHyperService::new(router), straight: None }
    }

    /// Notifications of this API past it.
    pub(super) fn past(self, api: Shared) -> Self {
        Self { straight: Some(api), ..self }
    }
}

impl Service<Request<Incoming>> for Entrance {
    type Response = Response;
    type Error = Infallible;
    type Future = Either<
        BoxFuture<'static, Result<Response, Infallible>>,
        <TowerToHyperService<Router> as Service<Request<Incoming>>>::Future,
    >;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        match &self.straight {
            Some(api) if request.method() == Method::POST && request.uri().path() == notifications::PATH => {
                let (api, handled_by) = (Arc::clone(api), Arc::clone(api));
                let handle = move |request| notifications::send_straight(handled_by, request);
                let pattern = Pattern::Fixed(notifications::PATH);
                Either::Left(Box::pin(frame(api, pattern, request.map(Body::new), handle).map(Ok)))
            }
            _ => Either::Right(self.router.call(request)),
        }
    }
}
