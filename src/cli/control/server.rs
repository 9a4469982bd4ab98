//! Running the commands of others.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with, sockopt,
};
use tracing::{info, warn};

use super::NAME;
use super::message::{Answer, Request, receive, send};
use crate::cli::exit::Exit;
use crate::cli::io::Io;
use crate::cli::site::Site;
use crate::layer::Layers;
use crate::store::Error;

/// Commands at once. Each has a thread and some open files.
const MAX_CLIENTS: usize = 16;
/// How long a client may take to say what it wants.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// The open socket of a store. When it is dropped, nobody is accepted any more and running commands are cancelled.
pub struct Control {
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    site: Site,
    /// Is called after each command, which may have changed refs.
    changed: Box<dyn Fn() + Send + Sync>,
    clients: AtomicUsize,
    /// The flags of running commands, to cancel them at the end.
    running: Mutex<Vec<Weak<AtomicBool>>>,
    stop: OwnedFd,
}

impl Control {
    /// Opens the socket of a store that this process has open, replacing one that a dead process has left.
    pub fn open(layers: Layers, changed: impl Fn() + Send + Sync + 'static) -> Result<Control, Error> {
        let store = layers.store().clone();
        let path = store.root().join(NAME);
        let failed = |action: &'static str| {
            let path = path.clone();
            move |e: Errno| Error::Io {
                action,
                path,
                source: e.into(),
            }
        };
        let listener = bound(store.root()).map_err(failed("open the socket"))?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(failed("prepare"))?;
        let shared = Arc::new(Shared {
            site: Site { store, layers },
            changed: Box::new(changed),
            clients: AtomicUsize::new(0),
            running: Mutex::default(),
            stop,
        });
        let accepting = {
            let shared = shared.clone();
            std::thread::spawn(move || accept(&listener, &shared))
        };
        Ok(Control {
            shared,
            accepting: Some(accepting),
        })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Writing to an eventfd fails only if its counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
        if let Some(accepting) = self.accepting.take() {
            // A panic there has been reported.
            let _ = accepting.join();
        }
        let running = self.shared.running.lock().unwrap_or_else(PoisonError::into_inner);
        for cancel in running.iter().filter_map(Weak::upgrade) {
            cancel.store(true, Ordering::Relaxed);
        }
    }
}

/// The store's lock is ours, so whatever is under the name is nobody's any more. By the folder's descriptor, because a
/// socket's path may have no more than 107 bytes.
fn bound(root: &std::path::Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    match rustix::fs::unlinkat(&folder, NAME, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{NAME}", folder.as_raw_fd()))?;
    bind(&socket, &address)?;
    // Nobody can connect before `listen`.
    rustix::fs::chmodat(&folder, NAME, Mode::from_raw_mode(0o600), AtFlags::empty())?;
    listen(&socket, MAX_CLIENTS as i32)?;
    Ok(socket)
}

fn accept(listener: &OwnedFd, shared: &Arc<Shared>) {
    loop {
        let mut ready = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(&shared.stop, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) if !ready[1].revents().is_empty() => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                warn!(%error, "cannot wait for commands any more");
                return;
            }
        }
        if ready[0].revents().is_empty() {
            continue;
        }
        let client = match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(client) => client,
            Err(error) => {
                // Out of descriptors, most likely: not to be asked again at once.
                warn!(%error, "cannot accept a command");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if shared.clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
            shared.clients.fetch_sub(1, Ordering::Relaxed);
            answer(
                &client,
                &Answer::Refused("it runs as many commands as it can; try again later".to_owned()),
            );
            continue;
        }
        let shared = shared.clone();
        std::thread::spawn(move || {
            let said = {
                let _one_less = OneLess(&shared.clients);
                serve(&client, &shared)
            };
            // Whoever has the answer finds the place free.
            answer(&client, &said.unwrap_or_else(Answer::Refused));
        });
    }
}

struct OneLess<'a>(&'a AtomicUsize);

impl Drop for OneLess<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Reads one command and runs it. Fails with why it was not run.
fn serve(client: &OwnedFd, shared: &Shared) -> Result<Answer, String> {
    match sockopt::socket_peercred(client) {
        Ok(peer) if peer.uid.is_root() => {}
        Ok(peer) => {
            warn!(uid = peer.uid.as_raw(), "refused a command of a user who is not root");
            return Err("it takes commands of root only".to_owned());
        }
        Err(error) => return Err(format!("it cannot tell who asks: {error}")),
    }
    let mut ready = [PollFd::new(client, PollFlags::IN)];
    if !matches!(poll(&mut ready, Some(&PATIENCE)), Ok(1..)) {
        return Err("no command came".to_owned());
    }
    let (bytes, files) = receive(client).map_err(|error| match error {
        Errno::MSGSIZE => "the command is too long".to_owned(),
        error => format!("it cannot read the command: {error}"),
    })?;
    let request: Request = serde_json::from_slice(&bytes)
        .map_err(|error| format!("it does not know the command ({error}): use a larder of its version"))?;
    let mut files = files.into_iter().map(File::from);
    let (Some(stdin), Some(stdout), Some(stderr)) = (files.next(), files.next(), files.next()) else {
        return Err("the command came without stdin, stdout and stderr".to_owned());
    };
    let cancel = shared.begin();
    info!(command = ?request.command, "running a command");
    let mut io = Io::new(stdin, stdout, stderr, request.output, cancel.clone());
    let ended = AtomicBool::new(false);
    let exit = std::thread::scope(|scope| {
        scope.spawn(|| cancel_when_gone(client, &cancel, &ended));
        let _end = SetOnDrop(&ended);
        let result = request
            .command
            .run(&shared.site, files.map(OwnedFd::from).collect(), &mut io);
        io.finish(result)
    });
    (shared.changed)();
    info!(exit = exit as u8, "the command ended");
    Ok(Answer::Exit(exit as u8))
}

impl Shared {
    /// The flag of a command that begins.
    fn begin(&self) -> Arc<AtomicBool> {
        let cancel = Arc::new(AtomicBool::new(false));
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|cancel| cancel.strong_count() > 0);
        running.push(Arc::downgrade(&cancel));
        cancel
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sets `cancel` when the client has shut its side down or is gone, until `ended`.
fn cancel_when_gone(client: &OwnedFd, cancel: &AtomicBool, ended: &AtomicBool) {
    let look = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    while !ended.load(Ordering::Relaxed) {
        let mut ready = [PollFd::new(client, PollFlags::RDHUP)];
        if matches!(poll(&mut ready, Some(&look)), Ok(1..)) {
            cancel.store(true, Ordering::Relaxed);
            return;
        }
    }
}

/// Best effort: a client that is gone needs no answer.
fn answer(client: &OwnedFd, answer: &Answer) {
    if let Ok(bytes) = serde_json::to_vec(answer) {
        let _ = send(client, &bytes, &[]);
    }
}

/// The exit codes are small.
const _: () = assert!(Exit::ClosedPipe as u32 <= u8::MAX as u32);
