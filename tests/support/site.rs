//! A node with an agent at work, a namespace, and a folder of sources: what most tests of the whole need.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use larder::api::conditions::{READY, find};
use larder::api::{CasManifest, NodeStore, RetentionPolicy, WritableLayer};
use serde_json::{Value, json};

use super::{Cluster, LarderProcess, StoreDir, eventually, free_port, larder_process, temp_store_dir, unique};

/// How long anything that the tests wait for may take, on a machine that does much else.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The agent is killed and the store unmounted when it is dropped.
pub struct Site {
    pub cluster: &'static Cluster,
    pub namespace: String,
    pub node: String,
    pub agent: LarderProcess,
    pub store: StoreDir,
}

impl Site {
    /// A new node with an agent, whose label `site` is the node's own name: a selector that no other test's node has.
    pub async fn start(prefix: &str) -> Site {
        let cluster = Cluster::shared().await;
        cluster.controller_process().await;
        Self::start_in(cluster, prefix).await
    }

    /// As [`Site::start`], where the test has a controller of its own.
    pub async fn start_in(cluster: &'static Cluster, prefix: &str) -> Site {
        let namespace = cluster.namespace(prefix).await;
        let node = unique(&format!("{prefix}-node"));
        cluster.node(&node, &[("site", &node)]).await;
        let store = temp_store_dir();
        std::fs::create_dir_all(store.path().join("sources")).expect("a folder");
        let agent = cluster
            .agent_process(&node, &store, &[root_of(&store, &namespace)], &[])
            .await;
        Site {
            cluster,
            namespace,
            node,
            agent,
            store,
        }
    }

    /// Starts the agent anew over the same store, after it was killed.
    pub async fn restart_agent(&mut self) {
        self.restart_agent_with(&[]).await;
    }

    /// The same, with more arguments.
    pub async fn restart_agent_with(&mut self, more: &[&str]) {
        let roots = [root_of(&self.store, &self.namespace)];
        let agent = self.cluster.agent_process(&self.node, &self.store, &roots, more);
        self.agent = agent.await;
    }

    /// Starts an agent over the same store whose API server is away: nobody listens at its address.
    pub async fn offline_agent(&self, more: &[&str]) -> LarderProcess {
        let kubeconfig = self.store.path().join("away.kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"http://127.0.0.1:{}\"}}}}]\n\
             users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
            free_port()
        );
        std::fs::write(&kubeconfig, text).expect("a kubeconfig");
        let (port, root) = (free_port(), self.root().display().to_string());
        let (listen, allowed) = (format!("127.0.0.1:{port}"), root_of(&self.store, &self.namespace));
        let mut args = vec!["agent", "--node-name", &self.node, "--root", &root];
        args.extend(["--listen", &listen, "--source-root", &allowed]);
        args.extend(more);
        let mut agent = larder_process(&args, Some(&kubeconfig));
        agent.wait_ready(port).await;
        agent
    }

    /// The folder NAME among the sources, and its path as a manifest names it.
    pub fn source(&self, name: &str) -> PathBuf {
        self.store.path().join("sources").join(name)
    }

    /// The agent's store.
    pub fn root(&self) -> PathBuf {
        self.store.path().join("store")
    }

    pub async fn manifests(&self) -> Api<CasManifest> {
        Api::namespaced(self.cluster.client().await, &self.namespace)
    }

    pub async fn layers(&self) -> Api<WritableLayer> {
        Api::namespaced(self.cluster.client().await, &self.namespace)
    }

    pub async fn node_store(&self) -> NodeStore {
        Api::all(self.cluster.client().await)
            .get(&self.node)
            .await
            .expect("the NodeStore")
    }

    /// Creates a CasManifest of the source folder of its name, on this site's node only; `fields` are joined into the
    /// spec.
    pub async fn create_manifest(&self, name: &str, fields: Value) -> CasManifest {
        let mut spec = json!({"source": {"directory": {"path": self.source(name)}}});
        if fields.pointer("/source/layer").is_none() {
            spec["nodeSelector"] = json!({"site": self.node});
        }
        for (field, value) in fields.as_object().expect("fields") {
            spec[field] = value.clone();
        }
        let manifest = json!({"apiVersion": "larder.dev/v1alpha1", "kind": "CasManifest", "metadata": {"name": name}, "spec": spec});
        let manifest = serde_json::from_value(manifest).expect("a CasManifest");
        self.manifests()
            .await
            .create(&PostParams::default(), &manifest)
            .await
            .expect("created")
    }

    pub async fn create_layer(&self, name: &str, manifest: &str, fields: Value) -> WritableLayer {
        let mut spec = json!({"manifest": {"name": manifest}, "nodeName": self.node, "sizeLimit": "64Mi"});
        for (field, value) in fields.as_object().expect("fields") {
            spec[field] = value.clone();
        }
        let layer = json!({"apiVersion": "larder.dev/v1alpha1", "kind": "WritableLayer", "metadata": {"name": name}, "spec": spec});
        let layer = serde_json::from_value(layer).expect("a WritableLayer");
        self.layers()
            .await
            .create(&PostParams::default(), &layer)
            .await
            .expect("created")
    }

    /// Waits until the manifest's Ready has this status and reason for its current generation and request.
    pub async fn manifest_says(&self, name: &str, status: &str, reason: &str) -> CasManifest {
        let api = self.manifests().await;
        eventually(PATIENCE, &format!("{name} says {status}/{reason}"), async || {
            let manifest = api.get(name).await.map_err(|error| error.to_string())?;
            let said = manifest.status.clone().unwrap_or_default();
            let current = manifest.metadata.generation == Some(said.observed_generation)
                && larder::api::requested_at(&manifest.metadata) == said.last_handled_reconcile_at;
            match find(&said.conditions, READY) {
                Some(ready) if ready.status == status && ready.reason == reason && (current || status != "True") => {
                    Ok(manifest)
                }
                _ => Err(format!("{said:?}")),
            }
        })
        .await
    }

    /// Waits until the layer's Ready has this status and reason.
    pub async fn layer_says(&self, name: &str, status: &str, reason: &str) -> WritableLayer {
        let api = self.layers().await;
        // Some of it is seen only at the next look, half a minute later.
        eventually(PATIENCE * 2, &format!("{name} says {status}/{reason}"), async || {
            let layer = api.get(name).await.map_err(|error| error.to_string())?;
            let said = layer.status.clone().unwrap_or_default();
            match find(&said.conditions, READY) {
                Some(ready) if ready.status == status && ready.reason == reason => Ok(layer),
                _ => Err(format!("{said:?}")),
            }
        })
        .await
    }

    /// Asks for the manifest to be built again; follow with [`Site::manifest_says`].
    pub async fn request(&self, name: &str) {
        let patch = json!({"metadata": {"annotations": {"larder.dev/requestedAt": unique("request")}}});
        self.manifests()
            .await
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .expect("annotated");
    }

    pub async fn delete_manifest(&self, name: &str) {
        self.manifests()
            .await
            .delete(name, &DeleteParams::default())
            .await
            .expect("deleted");
    }

    /// Deletes a layer and waits until it is gone.
    pub async fn delete_layer(&self, name: &str) {
        let api = self.layers().await;
        api.delete(name, &DeleteParams::default()).await.expect("deleted");
        eventually(PATIENCE, &format!("{name} is gone"), async || {
            match api.get_opt(name).await {
                Ok(None) => Ok(()),
                other => Err(format!("{:?}", other.map(|layer| layer.and_then(|layer| layer.status)))),
            }
        })
        .await;
    }

    /// Waits until neither side of the NodeStore names the manifest.
    pub async fn dropped(&self, name: &str) {
        eventually(PATIENCE, &format!("{name} leaves the node"), async || {
            let store = self.node_store().await;
            let planned = store.spec.manifests.iter().any(|manifest| manifest.name == name);
            let stored = store
                .status
                .unwrap_or_default()
                .manifests
                .iter()
                .any(|manifest| manifest.name == name);
            if planned || stored {
                Err(format!("planned: {planned}, stored: {stored}"))
            } else {
                Ok(())
            }
        })
        .await;
    }

    /// Makes a policy for this node alone, which has these rules, and returns its name: as given, and then unique.
    pub async fn create_policy(&self, prefix: &str, mut rules: Value) -> String {
        let name = unique(prefix);
        rules["nodeSelector"] = json!({"site": self.node});
        let policy = json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "RetentionPolicy", "metadata": {"name": name}, "spec": rules,
        });
        let policy = serde_json::from_value(policy).expect("a policy");
        let created = self.policies().await.create(&PostParams::default(), &policy).await;
        created.expect("created");
        name
    }

    /// Asks for a run of the policy now; gives what it answers with when its nodes have made it.
    pub async fn request_run(&self, name: &str) -> String {
        let request = unique("run");
        let patch = json!({"metadata": {"annotations": {"larder.dev/requestedAt": request}}});
        let patch = Patch::Merge(patch);
        let patched = self.policies().await.patch(name, &PatchParams::default(), &patch).await;
        patched.expect("annotated");
        request
    }

    /// Asks for a run of the policy now, and waits until its nodes have answered.
    pub async fn run_policy(&self, name: &str) -> RetentionPolicy {
        let (api, request) = (self.policies().await, self.request_run(name).await);
        eventually(PATIENCE, &format!("{name} has run"), async || {
            let policy = api.get(name).await.map_err(|error| error.to_string())?;
            let said = policy.status.clone().unwrap_or_default();
            match said.last_handled_reconcile_at.as_ref() == Some(&request) {
                true => Ok(policy),
                false => Err(format!("{said:?}")),
            }
        })
        .await
    }

    /// Runs `larder store ARGS` on the site's store.
    pub fn larder_store(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
        command.args(["store", "--store"]).arg(self.root()).args(args);
        command.output().expect("larder starts")
    }

    /// What `larder store ARGS -o json` says of the site's store.
    pub fn store_json(&self, args: &[&str]) -> Value {
        let output = self.larder_store(&[&["-o", "json"], args].concat());
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{args:?}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// What `kubectl get` prints of an object, by column.
    pub fn columns(&self, kind: &str, name: &str) -> BTreeMap<String, String> {
        let table = self.cluster.kubectl_ok(["get", kind, name, "-o", "wide"]);
        let (header, line) = table.trim_end().split_once('\n').expect("a header and a line");
        // An empty cell is blank, so the header says where each begins.
        let mut starts: Vec<usize> = vec![0];
        let is_start = |at: &usize| header[..*at].ends_with(' ') && !header[*at..].starts_with(' ');
        starts.extend((1..header.len()).filter(is_start));
        let ends = starts.iter().skip(1).copied().chain([usize::MAX]);
        let cell = |text: &str, start: usize, end: usize| {
            let end = end.min(text.len());
            text.get(start.min(end)..end).unwrap_or_default().trim().to_owned()
        };
        starts
            .iter()
            .zip(ends)
            .map(|(start, end)| (cell(header, *start, end), cell(line, *start, end)))
            .collect()
    }

    pub async fn policies(&self) -> Api<RetentionPolicy> {
        Api::all(self.cluster.client().await)
    }

    /// Events about an object of that name: type, reason and note of each. Those about one without a namespace are in
    /// `default`.
    pub fn events(&self, namespace: &str, name: &str) -> Vec<[String; 3]> {
        let shown = ["get", "events.v1.events.k8s.io", "-n", namespace, "-o", "json"];
        let shown: Value = serde_json::from_str(&self.cluster.kubectl_ok(shown)).expect("a list");
        let items = shown["items"].as_array().expect("events").iter();
        let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
        items
            .filter(|event| event["regarding"]["name"] == name)
            .map(|event| ["type", "reason", "note"].map(|field| text(event, field)))
            .collect()
    }

    /// Waits until no loop device is left; the kernel lets go of one a moment after its last mount is gone.
    pub async fn no_loop_devices(&self) {
        eventually(PATIENCE, "no loop device is left", async || {
            let left = self.store.loop_devices();
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        })
        .await;
    }

    /// The digests of all blobs in the store.
    pub fn blobs(&self) -> Vec<String> {
        let mut blobs = Vec::new();
        for shard in std::fs::read_dir(self.root().join("objects"))
            .expect("objects")
            .map(|shard| shard.expect("a shard"))
        {
            for blob in std::fs::read_dir(shard.path()).expect("a shard") {
                let name = blob.expect("a blob").file_name();
                blobs.push(format!(
                    "{}{}",
                    shard.file_name().to_string_lossy(),
                    name.to_string_lossy()
                ));
            }
        }
        blobs.sort();
        blobs
    }

    /// Fails unless every blob has the bytes that its name says and nothing of a build is left over.
    pub fn check_store(&self) {
        use sha2::Digest;
        for blob in self.blobs() {
            let bytes = std::fs::read(self.root().join("objects").join(&blob[..2]).join(&blob[2..])).expect("a blob");
            assert_eq!(
                hex::encode(sha2::Sha256::digest(&bytes)),
                blob,
                "a blob has other bytes than its name says"
            );
        }
        let staging: Vec<_> = std::fs::read_dir(self.root().join("staging"))
            .expect("staging")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        assert!(staging.is_empty(), "left over: {staging:?}");
    }
}

/// Writes `files` files of different content into a folder.
pub fn write_files(folder: &Path, files: usize, seed: &str) {
    std::fs::create_dir_all(folder).expect("a folder");
    for file in 0..files {
        let text = format!("file {file} of {seed}\n").repeat(1 + file % 40);
        std::fs::write(folder.join(format!("file-{file:05}")), text).expect("a file");
    }
}

fn root_of(store: &StoreDir, namespace: &str) -> String {
    format!("{}={namespace}", store.path().join("sources").display())
}
