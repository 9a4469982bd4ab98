//! Answers to own writes beside what a watch brings: whichever is older must not take the place of the other.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Whether the answer to an own write may take the place of what is known of its object: the watch may have brought a
/// later change of somebody else's before, or that the object is gone. `known` is the UID and resource version.
///
/// An older state that was taken for the newest one would stay: the watch brings nothing again, and every further write
/// based on it is a conflict. Resource versions of one kind are compared as the numbers that they are (Kubernetes
/// promises that since 1.35, KEP-5504; with etcd they always were). What comes by the watch is not to be judged so: after
/// the cluster's data were restored, it may rightly be older.
pub fn is_news(known: Option<(&str, &str)>, answer: &ObjectMeta) -> bool {
    let Some((uid, version)) = known else {
        return false;
    };
    let number = |version: &str| version.parse::<u128>().ok();
    let answered = answer.resource_version.as_deref().unwrap_or_default();
    let is_older = match (number(answered), number(version)) {
        (Some(answered), Some(known)) => answered < known,
        _ => false,
    };
    answer.uid.as_deref() == Some(uid) && !is_older
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_unless_the_watch_is_ahead_of_it() {
        let answer = |uid: &str, version: &str| ObjectMeta {
            uid: Some(uid.to_owned()),
            resource_version: Some(version.to_owned()),
            ..Default::default()
        };
        for (known, answer, news) in [
            (Some(("u", "99")), answer("u", "100"), true),
            (Some(("u", "100")), answer("u", "100"), true),
            (Some(("u", "101")), answer("u", "100"), false),
            (Some(("u", "1000")), answer("u", "999"), false),
            (Some(("another", "99")), answer("u", "100"), false),
            (None, answer("u", "100"), false),
            // Not numbers: nothing is known of their order.
            (Some(("u", "b")), answer("u", "a"), true),
        ] {
            assert_eq!(is_news(known, &answer), news, "{known:?} {answer:?}");
        }
    }
}
