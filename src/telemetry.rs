//! Logs and metric names.
//!
//! Promises: metric names live here and nowhere else; labels are bounded (a topic, a reason, a room), never a device, a
//! user or a token. Logs go to standard error, one line an event.

/// Metric names, and the few calls that need their labels right.
pub mod names {
    /// Requests to the API, by method, route and status.
    pub const HTTP_REQUESTS: &str = "sonnette_http_requests_total";
    /// How long they took, by route.
    pub const HTTP_DURATION: &str = "sonnette_http_request_duration_seconds";
    /// Deliveries that ended, by topic, environment, outcome and reason.
    pub const DELIVERIES: &str = "sonnette_deliveries_total";
    /// Chunks that wait, by topic and lane.
    pub const QUEUE_DEPTH: &str = "sonnette_queue_depth";
    /// How long the oldest of them has been due, by topic and lane.
    pub const QUEUE_OLDEST_AGE: &str = "sonnette_queue_oldest_age_seconds";
    /// From the write of a push to APNs' answer, by environment and status.
    pub const APNS_DURATION: &str = "sonnette_apns_request_duration_seconds";
    /// Connections to APNs, by topic and environment.
    pub const APNS_CONNECTIONS: &str = "sonnette_apns_connections";
    /// 1 while a breaker is open, by topic and environment.
    pub const BREAKER_OPEN: &str = "sonnette_breaker_open";
    /// The age of the provider token that a new request would carry, by topic and environment.
    pub const PROVIDER_TOKEN_AGE: &str = "sonnette_provider_token_age_seconds";
    /// 1, with the version.
    pub const BUILD_INFO: &str = "sonnette_build_info";
    /// 1 if a new request could be kept.
    pub const DATABASE_UP: &str = "sonnette_database_up";
    /// Replicas that are alive.
    pub const REPLICAS: &str = "sonnette_replicas";

    /// A delivery has ended.
    pub fn delivery_ended(topic: &str, environment: &'static str, outcome: &'static str, reason: &str) {
        metrics::counter!(
            DELIVERIES,
            "topic" => topic.to_owned(),
            "environment" => environment,
            "outcome" => outcome,
            "reason" => reason.to_owned()
        )
        .increment(1);
    }
}
