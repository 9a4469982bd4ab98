//! The names of the store's steps.

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A place in the code that changes the disk, or that reads what another could have damaged.
        ///
        /// The crash kit stops the program at each of them (`tests/crash/`); a name that nothing reaches fails it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Step {
            $($(#[$doc])* $name,)*
        }

        #[cfg(test)]
        impl Step {
            pub const ALL: &[Step] = &[$(Step::$name,)*];
        }
    };
}

steps! {
    // Opening a store, making it if there is none.
    RootDir,
    LockCreate,
    LockTruncate,
    LockWrite,
    LayoutDir,
    ConfigCreate,
    ConfigWrite,
    ConfigSync,
    ConfigRename,
    LayoutSync,
    StagingDir,
    SpareCreate,
    SpareWrite,
    SpareSync,
    SpareRename,
    SpareDiscard,

    // Putting contents.
    BuildDir,
    SourceRead,
    BlobCreate,
    BlobWrite,
    BlobTruncate,
    BlobReflink,
    BlobCopy,
    /// What was stored by sharing blocks, or by the kernel's copy, is hashed.
    StagedRead,
    BlobDiscard,
    BlobTouch,

    // Publishing.
    ManifestCreate,
    ManifestWrite,
    ManifestRead,
    ManifestDiscard,
    ManifestTouch,
    StagedSync,
    BlobRename,
    ShardDir,
    NamedSync,
    ManifestRename,
    PublishedSync,

    // Refs.
    RefRead,
    RefCreate,
    RefWrite,
    /// A ref is written into the spare file, on a full disk.
    SpareTake,
    SpareFill,
    SpareTruncate,
    RefSync,
    NamespaceDir,
    RefRename,
    RefDiscard,
    RefRemove,
    NamespaceSync,
    NamespaceRemove,

    // What a build notes beside a ref.
    CacheDir,
    NoteCreate,
    NoteWrite,
    NoteRename,
    NoteDiscard,
    NoteRemove,

    // Holds, scratch folders.
    HoldTouch,
    ScratchDir,

    // Collecting.
    InUseTouch,
    ImageMove,
    ManifestRemove,
    SweepSync,
    RemovedSync,
    BlobRemove,

    // Verifying.
    VerifyRead,
    QuarantineDir,
    BlobQuarantine,
    QuarantineSync,
    RunsDir,
    RecordCreate,
    RecordWrite,
    RecordSync,
    RecordRename,
    RecordDiscard,

    // Recording a collection.
    RunCreate,
    RunWrite,
    RunRename,
    RunDiscard,
    RunRemove,

    // Removing a folder: of a build, of an image, what a dead process left.
    TreeUnlink,
    TreeMove,
    TreeRmdir,
    TreeFlags,

    // Writing a tree as files.
    ExportRoot,
    ExportAcl,
    ExportRootMode,
    ExportDir,
    ExportFile,
    ExportSpecial,
    ExportLink,
    ExportReflink,
    ExportCopy,
    ExportRead,
    ExportWrite,
    ExportTruncate,
    ExportOwner,
    ExportMode,
    ExportXattr,
    ExportTime,
}
