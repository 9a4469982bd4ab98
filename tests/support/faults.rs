//! A client whose requests can be counted, refused, cut off or held up, for tests that run the controller or the agent's
//! API side in the test's own process.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body as AnyBody;
use http::{Method, Request, Response, StatusCode};
use kube::client::{Body, ClientBuilder, DynBody};
use kube::{Client, Config};
use serde_json::json;
use tower::{BoxError, Layer, Service};

/// What a matching request gets instead of the API server's answer.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The API server's refusal with this HTTP status and reason, such as 409 and `Conflict`.
    Refuse(u16, &'static str),
    /// No answer for this long, then the connection breaks.
    Hang(Duration),
    /// The connection breaks at once.
    Disconnect,
    /// The request is carried out, and its answer is lost: what a timeout looks like to the caller.
    Lose,
    /// The request is carried out this much later.
    Delay(Duration),
    /// An empty list, as from a server that was restored from nothing.
    EmptyList,
}

type Matches = Box<dyn Fn(&Method, &str) -> bool + Send + Sync>;

/// Which requests are answered how, and how many of them.
pub struct Rule {
    matches: Matches,
    answer: Answer,
    /// How many requests more; without it, all until the rule is cleared.
    left: Option<usize>,
}

impl Rule {
    /// For requests of which `matches` is true, given the method and the path with its query.
    pub fn new(matches: impl Fn(&Method, &str) -> bool + Send + Sync + 'static, answer: Answer) -> Rule {
        Rule {
            matches: Box::new(matches),
            answer,
            left: None,
        }
    }

    /// Only the first `count` requests that match.
    pub fn times(mut self, count: usize) -> Rule {
        self.left = Some(count);
        self
    }
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    seen: Vec<(Method, String)>,
}

/// The faults of one client (and its clones), which a test changes while the client is in use.
#[derive(Clone, Default)]
pub struct Faults(Arc<Mutex<State>>);

impl Faults {
    /// No faults yet: requests are only counted.
    pub fn new() -> Faults {
        Faults::default()
    }

    /// A client with these faults. They lie over kube's own retries, so a refusal reaches the caller as it is.
    pub fn client(&self, config: Config) -> Client {
        ClientBuilder::try_from(config)
            .expect("a client")
            .with_layer(&FaultLayer(self.clone()))
            .build()
    }

    /// Adds a rule. The first one that matches a request answers it.
    pub fn add(&self, rule: Rule) {
        self.state().rules.push(rule);
    }

    /// Takes all rules away.
    pub fn clear(&self) {
        self.state().rules.clear();
    }

    /// How many requests so far `matches` is true of, those that were refused among them.
    pub fn count(&self, matches: impl Fn(&Method, &str) -> bool) -> usize {
        self.state()
            .seen
            .iter()
            .filter(|(method, path)| matches(method, path))
            .count()
    }

    /// All requests so far, with their paths and queries.
    pub fn seen(&self) -> Vec<(Method, String)> {
        self.state().seen.clone()
    }

    /// Requests that write: anything but GET.
    pub fn writes(&self) -> Vec<(Method, String)> {
        self.seen()
            .into_iter()
            .filter(|(method, _)| method != Method::GET)
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A predicate of a failed test may have panicked: the state is whole all the same.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn answer(&self, method: &Method, path: &str) -> Option<Answer> {
        let mut state = self.state();
        state.seen.push((method.clone(), path.to_string()));
        let rule = state
            .rules
            .iter_mut()
            .find(|rule| rule.left != Some(0) && (rule.matches)(method, path))?;
        if let Some(left) = &mut rule.left {
            *left -= 1;
        }
        Some(rule.answer.clone())
    }
}

/// The tower layer by which [`Faults`] get into a client.
pub struct FaultLayer(Faults);

impl<S> Layer<S> for FaultLayer {
    type Service = FaultService<S>;

    fn layer(&self, inner: S) -> FaultService<S> {
        FaultService {
            inner,
            faults: self.0.clone(),
        }
    }
}

pub struct FaultService<S> {
    inner: S,
    faults: Faults,
}

type Answered = Pin<Box<dyn Future<Output = Result<Response<AnyBody>, BoxError>> + Send>>;

impl<S> Service<Request<Body>> for FaultService<S>
where
    S: Service<Request<Body>, Response = Response<Box<DynBody>>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<AnyBody>;
    type Error = BoxError;
    type Future = Answered;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Answered {
        let path = request
            .uri()
            .path_and_query()
            .map(|path| path.as_str().to_string())
            .unwrap_or_default();
        let answer = self.faults.answer(request.method(), &path);
        let broken = move |what: &str| -> BoxError { format!("{what} (injected for {path})").into() };
        match answer {
            Some(Answer::Refuse(code, reason)) => Box::pin(async move { Ok(refusal(code, reason)) }),
            Some(Answer::EmptyList) => Box::pin(async move { Ok(empty_list()) }),
            Some(Answer::Disconnect) => Box::pin(async move { Err(broken("connection reset")) }),
            Some(Answer::Hang(time)) => Box::pin(async move {
                tokio::time::sleep(time).await;
                Err(broken("connection timed out"))
            }),
            Some(Answer::Lose) => {
                let carried_out = self.inner.call(request);
                Box::pin(async move {
                    carried_out.await?;
                    Err(broken("connection timed out"))
                })
            }
            Some(Answer::Delay(time)) => {
                let carried_out = self.inner.call(request);
                Box::pin(async move {
                    tokio::time::sleep(time).await;
                    Ok(carried_out.await?.map(AnyBody::new))
                })
            }
            None => {
                let answered = self.inner.call(request);
                Box::pin(async move { Ok(answered.await?.map(AnyBody::new)) })
            }
        }
    }
}

fn refusal(code: u16, reason: &str) -> Response<AnyBody> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code, "reason": reason, "message": format!("{reason} (injected)"),
    });
    json_response(code, status)
}

fn empty_list() -> Response<AnyBody> {
    json_response(
        200,
        json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": []}),
    )
}

fn json_response(code: u16, body: serde_json::Value) -> Response<AnyBody> {
    let mut response = Response::new(AnyBody::from(body.to_string()));
    *response.status_mut() = StatusCode::from_u16(code).expect("an HTTP status");
    response
        .headers_mut()
        .insert("content-type", http::HeaderValue::from_static("application/json"));
    response
}
