#!/bin/sh
# The bucket `rushes`, and the user of the same name who may use it and nothing else. May run again at any time.
set -eu
mc alias set store http://store:9000 "$MINIO_ROOT_USER" "$MINIO_ROOT_PASSWORD"
mc mb --ignore-existing store/rushes
mc admin policy create store rushes /store-policy.json
mc admin user add store rushes "$STORE_SECRET_KEY"
# Attaching what is attached is an error to mc, so look first (the image has no grep).
case "$(mc admin user info store rushes)" in
    *"PolicyName: rushes"*) ;;
    *) mc admin policy attach store rushes --user rushes ;;
esac
