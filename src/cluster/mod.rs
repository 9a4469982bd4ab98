//! Talking to the API server, for the controller and the agent: following objects until their absence is proved,
//! writing with server-side apply, events, leases, back-off.

mod answer;
mod backoff;
mod events;
mod follow;
mod heartbeat;
mod write;

pub use answer::is_news;
pub use backoff::Backoff;
pub use events::{Announcer, Said};
pub use follow::{Followed, ObjectKey, follow, follow_in, uid_of};
pub use heartbeat::{HEARTBEAT_DURATION, heartbeat};
pub use write::{WriteError, apply_finalizers, apply_object, apply_status};

/// Longest time that one call to the API server may take.
pub const CALL_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(15);

/// The field manager of everything that agents write.
pub const AGENT_MANAGER: &str = "larder-agent";
