"""The cluster's operators: what keeps Node objects and Auto Scaling groups telling the same story.

`hygiene` removes the Nodes of instances that have ended; `spot` empties a node whose end was announced. Decisions are
pure; Kubernetes and AWS are behind doors (`cluster.Cluster`, `cloud.Cloud`, `notices.Notices`, `notices.Hooks`,
`router.Router`), each with its fake beside it.
"""
