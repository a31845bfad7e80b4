"""The ledger: what is true about requests, clips and the engines that render them. It knows no flow, model or store."""
