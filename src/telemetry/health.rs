//! `/healthz`, `/readyz` and `/metrics` over HTTP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::watch;
use tracing::info;

use super::Metrics;

/// Longest pause of the main loop before the process counts as stuck; the loop wakes every few seconds.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// Shared by the main loop, which reports, and the server, which answers.
#[derive(Clone)]
pub struct Health(Arc<Inner>);

struct Inner {
    ready: AtomicBool,
    started: Instant,
    /// Milliseconds from `started` to the last beat; 0 before the first, when nothing can be stuck yet.
    beat: AtomicU64,
    metrics: Metrics,
}

impl Health {
    /// Not ready, not stuck.
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            ready: AtomicBool::new(false),
            started: Instant::now(),
            beat: AtomicU64::new(0),
            metrics: Metrics::new(),
        }))
    }

    /// Sets what `/readyz` says.
    pub fn set_ready(&self, ready: bool) {
        self.0.ready.store(ready, Ordering::Relaxed);
    }

    /// The main loop is alive.
    pub fn beat(&self) {
        self.0
            .beat
            .store((self.0.started.elapsed().as_millis() as u64).max(1), Ordering::Relaxed);
    }

    /// The process's metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    fn stuck(&self) -> bool {
        let beat = self.0.beat.load(Ordering::Relaxed);
        beat > 0 && self.0.started.elapsed() > Duration::from_millis(beat) + STUCK_AFTER
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

/// Serves until `stop` is true.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(address: SocketAddr, health: Health, mut stop: watch::Receiver<bool>) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    info!(address = %listener.local_addr()?, "serving /healthz, /readyz and /metrics");
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(health);
    let stopped = async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    axum::serve(listener, router).with_graceful_shutdown(stopped).await
}

async fn healthz(State(health): State<Health>) -> Response {
    if health.stuck() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the main loop is stuck\n").into_response();
    }
    "ok\n".into_response()
}

async fn readyz(State(health): State<Health>) -> Response {
    if health.0.ready.load(Ordering::Relaxed) {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response()
}

async fn metrics(State(health): State<Health>) -> Response {
    match health.metrics().text() {
        Ok(text) => (
            [(
                header::CONTENT_TYPE,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )],
            text,
        )
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
