//! What an operator's admin looks at from outside: logs, health, metrics.

mod health;
mod logs;
mod metrics;
mod store;

pub use health::{Health, serve};
pub use logs::{LogFormat, init_logs};
pub use metrics::Metrics;
pub use store::StoreMetrics;
